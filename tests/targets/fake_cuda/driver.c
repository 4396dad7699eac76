/* NVIDIA's driver, as far as a library calls it, on this CPU: device memory is memory, a stream runs at once, and what
 * is launched are emulated kernels. Anything done out of order gives an error. A "cubin" is text: FAKE, then a line for
 * each kernel with its name, its number of arguments and the address of its launcher, then an empty line. */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK, INVALID = 1, NO_MEMORY = 2, NO_GPU = 100, NO_IMAGE = 200, NO_CONTEXT = 201, NOT_FOUND = 500, LAUNCH = 719 };
enum { MOST = 1 << 12, ARGUMENTS = 32 };

typedef unsigned long long address;
typedef int launcher(void **, const unsigned *, const unsigned *, int);
typedef struct { char name[256]; unsigned count; launcher *launch; } kernel;
typedef struct { unsigned count; kernel kernels[MOST]; } module;
typedef struct {
    void *to;
    const void *from;
    size_t bytes;
    kernel *kernel; /* NULL for a copy */
    void *values[ARGUMENTS];
    unsigned sizes[6];
} work;
typedef struct { unsigned count; work works[MOST]; } list;
typedef struct { list *captured; } stream;

/* What a test sets and reads. */
int fake_gpus = 1, fake_major = 8, fake_minor = 7, fake_error, fake_live, fake_graph_launches, fake_kernel_launches;
char fake_failing[64]; /* the function that gives fake_error */
size_t fake_memory = (size_t)1 << 32;

static int retained;
static _Thread_local int depth;
static struct { char *start; size_t size; } pieces[64];

#define BEGIN(needs_context)                                                          \
    if (strcmp(fake_failing, __func__) == 0) return fake_error;                       \
    if ((needs_context) && (depth == 0 || !retained)) return NO_CONTEXT

static bool is_ours(const void *start, size_t size) {
    for (int i = 0; i < 64; i++)
        if (pieces[i].start && (char *)start >= pieces[i].start &&
            (char *)start + size <= pieces[i].start + pieces[i].size)
            return true;
    return false;
}

static int allocate(void **start, size_t size) {
    if (size == 0 || size > fake_memory) return size ? NO_MEMORY : INVALID;
    for (int i = 0; i < 64; i++) {
        if (pieces[i].start) continue;
        if (!(pieces[i].start = aligned_alloc(256, (size + 255) / 256 * 256))) return NO_MEMORY;
        memset(pieces[i].start, 0xA7, size);
        pieces[i].size = size;
        *start = pieces[i].start;
        fake_live++;
        return OK;
    }
    return NO_MEMORY;
}

static int release(void *start) {
    for (int i = 0; i < 64; i++) {
        if (!start || pieces[i].start != start) continue;
        free(start);
        pieces[i].start = NULL;
        fake_live--;
        return OK;
    }
    return INVALID;
}

static int run(const work *work) {
    if (!work->kernel) {
        memcpy(work->to, work->from, work->bytes);
        return OK;
    }
    fake_kernel_launches++;
    return work->kernel->launch((void **)work->values, work->sizes, work->sizes + 3, 0) ? LAUNCH : OK;
}

static int put(stream *stream, const work *work) {
    if (!stream->captured) return run(work);
    if (stream->captured->count == MOST) return INVALID;
    stream->captured->works[stream->captured->count++] = *work;
    return OK;
}

int cuInit(unsigned flags) {
    BEGIN(false);
    return flags ? INVALID : fake_gpus ? OK : NO_GPU;
}

int cuGetErrorString(int error, const char **text) {
    *text = error == NO_MEMORY ? "out of memory" : error == LAUNCH ? "unspecified launch failure" : "fake error";
    return OK;
}

int cuDeviceGetCount(int *count) {
    BEGIN(false);
    *count = fake_gpus;
    return OK;
}

int cuDeviceGet(int *device, int number) {
    BEGIN(false);
    *device = number + 40;
    return number < fake_gpus ? OK : INVALID;
}

int cuDeviceGetName(char *name, int size, int device) {
    BEGIN(false);
    snprintf(name, (size_t)size, "Fake GPU %d", device - 40);
    return OK;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    BEGIN(false);
    if (device < 40 || (attribute != 75 && attribute != 76)) return INVALID;
    *value = attribute == 75 ? fake_major : fake_minor;
    return OK;
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
    BEGIN(false);
    *context = &retained;
    retained++;
    fake_live++;
    return device < 40 ? INVALID : OK;
}

int cuDevicePrimaryCtxRelease_v2(int device) {
    BEGIN(false);
    retained--;
    fake_live--;
    return device < 40 ? INVALID : OK;
}

int cuCtxPushCurrent_v2(void *context) {
    BEGIN(false);
    if (context != &retained || !retained) return NO_CONTEXT;
    depth++;
    return OK;
}

int cuCtxPopCurrent_v2(void **context) {
    BEGIN(true);
    depth--;
    *context = &retained;
    return OK;
}

int cuModuleLoadData(void **result, const void *image) {
    BEGIN(true);
    const char *text = image;
    if (strncmp(text, "FAKE\n", 5)) return NO_IMAGE;
    module *loaded = calloc(1, sizeof *loaded);
    int length;
    for (text += 5; *text != '\n' && loaded->count < MOST; text += length + 1) {
        kernel *next = &loaded->kernels[loaded->count++];
        unsigned long long place;
        if (sscanf(text, "%255s %u %llu%n", next->name, &next->count, &place, &length) != 3) return NO_IMAGE;
        next->launch = (launcher *)(uintptr_t)place;
    }
    *result = loaded;
    fake_live++;
    return OK;
}

int cuModuleUnload(void *loaded) {
    BEGIN(true);
    free(loaded);
    fake_live--;
    return OK;
}

int cuModuleGetFunction(void **result, void *loaded, const char *name) {
    BEGIN(true);
    module *from = loaded;
    for (unsigned i = 0; i < from->count; i++) {
        *result = &from->kernels[i];
        if (strcmp(from->kernels[i].name, name) == 0) return OK;
    }
    return NOT_FOUND;
}

int cuMemAlloc_v2(address *start, size_t size) {
    BEGIN(true);
    void *memory;
    const int error = allocate(&memory, size);
    if (!error) *start = (address)(uintptr_t)memory;
    return error;
}

int cuMemFree_v2(address start) {
    BEGIN(true);
    return release((void *)(uintptr_t)start);
}

int cuMemAllocHost_v2(void **start, size_t size) {
    BEGIN(true);
    return allocate(start, size);
}

int cuMemFreeHost(void *start) {
    BEGIN(true);
    return release(start);
}

int cuMemcpyHtoD_v2(address to, const void *from, size_t bytes) {
    BEGIN(true);
    if (!is_ours((void *)(uintptr_t)to, bytes)) return INVALID;
    memcpy((void *)(uintptr_t)to, from, bytes);
    return OK;
}

int cuMemcpyDtoH_v2(void *to, address from, size_t bytes) {
    BEGIN(true);
    if (!is_ours((void *)(uintptr_t)from, bytes)) return INVALID;
    memcpy(to, (void *)(uintptr_t)from, bytes);
    return OK;
}

/* Both ends must be the driver's: what the caller has may move before the copy is done. */
static int copy(void *to, const void *from, size_t bytes, stream *stream) {
    if (!is_ours(to, bytes) || !is_ours(from, bytes)) return INVALID;
    return put(stream, &(work){.to = to, .from = from, .bytes = bytes});
}

int cuMemcpyHtoDAsync_v2(address to, const void *from, size_t bytes, void *on) {
    BEGIN(true);
    return copy((void *)(uintptr_t)to, from, bytes, on);
}

int cuMemcpyDtoHAsync_v2(void *to, address from, size_t bytes, void *on) {
    BEGIN(true);
    return copy(to, (void *)(uintptr_t)from, bytes, on);
}

int cuMemsetD8_v2(address start, unsigned char value, size_t bytes) {
    BEGIN(true);
    if (!is_ours((void *)(uintptr_t)start, bytes)) return INVALID;
    memset((void *)(uintptr_t)start, value, bytes);
    return OK;
}

int cuStreamCreate(void **made, unsigned flags) {
    BEGIN(true);
    *made = calloc(1, sizeof(stream));
    fake_live++;
    return flags == 1 ? OK : INVALID;
}

int cuStreamDestroy_v2(void *ended) {
    BEGIN(true);
    free(ended);
    fake_live--;
    return OK;
}

int cuStreamSynchronize(void *on) {
    BEGIN(true);
    return ((stream *)on)->captured ? INVALID : OK;
}

int cuLaunchKernel(void *launched, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared_bytes, void *on, void **arguments, void **extra) {
    BEGIN(true);
    work work = {.kernel = launched, .sizes = {gx, gy, gz, bx, by, bz}};
    const bool is_sane = gx && gy && gz && bx && by && bz && bx * by * bz <= 1024 && gy < 65536 && gz < 65536;
    if (!is_sane || shared_bytes || extra || work.kernel->count > ARGUMENTS) return INVALID;
    for (unsigned i = 0; i < work.kernel->count; i++) {
        memcpy(&work.values[i], arguments[i], sizeof(void *));
        if (!is_ours(work.values[i], 0)) return INVALID;
    }
    return put(on, &work);
}

#ifndef WITHOUT_GRAPHS
int cuStreamBeginCapture_v2(void *on, int mode) {
    BEGIN(true);
    if (((stream *)on)->captured || mode != 2) return INVALID;
    ((stream *)on)->captured = calloc(1, sizeof(list));
    fake_live++;
    return OK;
}

int cuStreamEndCapture(void *on, void **graph) {
    BEGIN(true);
    *graph = ((stream *)on)->captured;
    ((stream *)on)->captured = NULL;
    return *graph ? OK : INVALID;
}

int cuGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags) {
    BEGIN(true);
    list *copied = malloc(sizeof *copied);
    *copied = *(list *)graph;
    *executable = copied;
    fake_live++;
    return flags ? INVALID : OK;
}

int cuGraphLaunch(void *executable, void *on) {
    BEGIN(true);
    const list *all = executable;
    fake_graph_launches++;
    if (((stream *)on)->captured) return INVALID;
    for (unsigned i = 0; i < all->count; i++)
        if (run(&all->works[i])) return LAUNCH;
    return OK;
}

int cuGraphExecDestroy(void *executable) {
    BEGIN(true);
    free(executable);
    fake_live--;
    return OK;
}

int cuGraphDestroy(void *graph) {
    BEGIN(true);
    free(graph);
    fake_live--;
    return OK;
}
#endif
