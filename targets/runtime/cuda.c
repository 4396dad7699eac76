/* A GPU that runs the steps, through CUDA's driver, which is opened when an instance is: without one the library still
 * loads and describes itself.
 *
 * An instance has one piece of the device's memory: the weights, the workspace, scratch, the inputs and the outputs.
 * The caller's buffers go through memory that the device reads and writes by itself, so that a run is one copy in, the
 * kernels and one copy out on one stream; they are captured once, into a graph, where the driver has graphs.
 */
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_driver.h"
#include "model.h"

enum { ALIGNMENT = 256, NAME = 64 };

#define NAME_OF(name, arguments) #name,
#define ONE(name, arguments) +1
static const char *const functions[] = {CUDA_DRIVER(NAME_OF) CUDA_GRAPHS(NAME_OF)};
enum { REQUIRED = 0 CUDA_DRIVER(ONE), FUNCTIONS = sizeof functions / sizeof *functions };
_Static_assert(sizeof(cuda_driver) == FUNCTIONS * sizeof(void *), "a driver is an array of pointers");

struct device {
    cuda_driver driver;
    int number;              /* the driver's, of the GPU */
    const uint8_t *cubin;
    void *context, *module, *stream, *graph; /* NULL: not there, or not yet */
    cuda_address memory;     /* all of the device's */
    uint8_t *staging;        /* a copy of the inputs and the outputs there, for the device to read and write */
    uint64_t *offsets;       /* in memory, of every buffer by its number, and the end */
    void **kernels;          /* of every launch */
    cuda_address *addresses; /* the arguments of one launch, and pointers to these */
    void **arguments;
};

static pumice_status load_driver(device *device, report to);
static pumice_status find_gpu(device *device, report to);
static pumice_status prepare(device *device, report to);
static pumice_status capture(device *device, report to);
static pumice_status enqueue(device *device, uint32_t first, uint32_t last, report to);
static pumice_status check(const device *device, int error, const char *what, report to);

static uint32_t buffer_count(void) { return FIRST_INPUT + pumice_model.input_count + pumice_model.output_count; }

static uint64_t bytes_of(uint32_t buffer) {
    const uint64_t fixed[] = {pumice_cuda.weights, pumice_model.workspace, pumice_model.scratch};
    if (buffer < FIRST_INPUT) return fixed[buffer];
    buffer -= FIRST_INPUT;
    return buffer < pumice_model.input_count ? pumice_model.inputs[buffer].bytes
                                             : pumice_model.outputs[buffer - pumice_model.input_count].bytes;
}

/* The offset of `buffer` in the device's memory; the size of all for the number after the last. */
static uint64_t offset_of(uint32_t buffer) {
    uint64_t offset = 0;
    for (uint32_t i = 0; i < buffer; i++) offset += (bytes_of(i) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return offset;
}

uint64_t device_memory(uint32_t threads) {
    (void)threads; /* the GPU brings its own */
    const uint64_t pointers = pumice_cuda.launch_count + 2 * (uint64_t)pumice_cuda.most_arguments + buffer_count() + 1;
    const uint64_t all = offset_of(buffer_count());
    return sizeof(device) + pointers * sizeof(uint64_t) + all + (all - offset_of(FIRST_INPUT));
}

pumice_status device_open(uint32_t threads, device **opened, report to) {
    (void)threads;
    device *device = calloc(1, sizeof *device);
    if (!device) return fail(to, PUMICE_NO_MEMORY, "no memory is left for an instance");
    device->offsets = calloc(buffer_count() + 1, sizeof *device->offsets);
    device->kernels = calloc(pumice_cuda.launch_count + 1, sizeof *device->kernels);
    device->addresses = calloc(pumice_cuda.most_arguments + 1, sizeof *device->addresses);
    device->arguments = calloc(pumice_cuda.most_arguments + 1, sizeof *device->arguments);
    pumice_status status = PUMICE_OK;
    if (!device->offsets || !device->kernels || !device->addresses || !device->arguments)
        status = fail(to, PUMICE_NO_MEMORY, "no memory is left for an instance");
    if (status == PUMICE_OK) status = load_driver(device, to);
    if (status == PUMICE_OK) status = find_gpu(device, to);
    if (status == PUMICE_OK) {
        status = prepare(device, to);
        if (device->context) device->driver.cuCtxPopCurrent_v2(&(void *){NULL});
    }
    if (status == PUMICE_OK)
        *opened = device;
    else
        device_close(device);
    return status;
}

pumice_status device_run(device *device, const void *const *inputs, void *const *outputs, uint32_t first, uint32_t last,
                         report to) {
    const cuda_driver *driver = &device->driver;
    const uint64_t *places = device->offsets + FIRST_INPUT;
    pumice_status status = check(device, driver->cuCtxPushCurrent_v2(device->context), "the GPU cannot be used", to);
    if (status != PUMICE_OK) return status;
    for (uint32_t i = 0; i < pumice_model.input_count; i++)
        memcpy(device->staging + (places[i] - *places), inputs[i], pumice_model.inputs[i].bytes);
    if (device->graph && first == 0 && last == pumice_model.step_count)
        status = check(device, driver->cuGraphLaunch(device->graph, device->stream), "a run cannot be launched", to);
    else
        status = enqueue(device, first, last, to);
    if (status == PUMICE_OK)
        status = check(device, driver->cuStreamSynchronize(device->stream), "a kernel failed", to);
    driver->cuCtxPopCurrent_v2(&(void *){NULL});
    places += pumice_model.input_count;
    for (uint32_t i = 0; status == PUMICE_OK && i < pumice_model.output_count; i++)
        memcpy(outputs[i], device->staging + (places[i] - device->offsets[FIRST_INPUT]), pumice_model.outputs[i].bytes);
    return status;
}

pumice_status device_clear(device *device, report to) {
    const cuda_driver *driver = &device->driver;
    const uint64_t size = pumice_model.workspace;
    pumice_status status = check(device, driver->cuCtxPushCurrent_v2(device->context), "the GPU cannot be used", to);
    if (status != PUMICE_OK || !size) return status;
    status = check(device, driver->cuMemsetD8_v2(device->memory + device->offsets[WORKSPACE], 0, size),
                   "the workspace cannot be cleared", to);
    driver->cuCtxPopCurrent_v2(&(void *){NULL});
    return status;
}

pumice_status device_read(device *device, void *const *outputs, const model_view *view, void *into, report to) {
    (void)outputs; /* the device has its own */
    const cuda_driver *driver = &device->driver;
    pumice_status status = check(device, driver->cuCtxPushCurrent_v2(device->context), "the GPU cannot be used", to);
    if (status != PUMICE_OK) return status;
    const cuda_address from = device->memory + device->offsets[view->buffer] + view->offset;
    status = check(device, driver->cuMemcpyDtoH_v2(into, from, view->bytes), "a result cannot be read", to);
    driver->cuCtxPopCurrent_v2(&(void *){NULL});
    return status;
}

void device_close(device *device) {
    const cuda_driver *driver = &device->driver;
    if (device->context) {
        driver->cuCtxPushCurrent_v2(device->context);
        if (device->graph) driver->cuGraphExecDestroy(device->graph);
        if (device->stream) driver->cuStreamDestroy_v2(device->stream);
        if (device->module) driver->cuModuleUnload(device->module);
        if (device->memory) driver->cuMemFree_v2(device->memory);
        if (device->staging) driver->cuMemFreeHost(device->staging);
        driver->cuCtxPopCurrent_v2(&(void *){NULL});
        driver->cuDevicePrimaryCtxRelease_v2(device->number);
    }
    free(device->offsets); /* the driver stays open: it has threads of its own, which cannot lose their code */
    free(device->kernels);
    free(device->addresses);
    free(device->arguments);
    free(device);
}

static pumice_status check(const device *device, int error, const char *what, report to) {
    if (!error) return PUMICE_OK;
    const char *text = NULL;
    if (device->driver.cuGetErrorString(error, &text) || !text) text = "unknown";
    return fail(to, PUMICE_DEVICE_FAILED, "%s: CUDA's error %d, %s", what, error, text);
}

static pumice_status load_driver(device *device, report to) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return fail(to, PUMICE_NO_DEVICE,
                    "this model runs on an NVIDIA GPU, and there is no driver of NVIDIA's (%s): install it, or compile "
                    "the model for this CPU", dlerror());
    for (int i = 0; i < FUNCTIONS; i++) {
        void *function = dlsym(library, functions[i]);
        if (!function && i < REQUIRED)
            return fail(to, PUMICE_NO_DEVICE, "NVIDIA's driver is too old, it has no %s: install a newer one",
                        functions[i]);
        memcpy((char *)&device->driver + i * sizeof function, &function, sizeof function);
    }
    const int error = device->driver.cuInit(0);
    if (error && check(device, error, "NVIDIA's driver finds no GPU that it can use", to)) return PUMICE_NO_DEVICE;
    return PUMICE_OK;
}

/* The GPUs of NVIDIA's own chips with a CPU run no other's code, nor others theirs. */
static bool is_tegra(uint32_t gpu) {
    return gpu == 53 || gpu == 62 || gpu == 72 || gpu == 87 || gpu == 101 || gpu == 110;
}

/* Code for a GPU runs on those of the same major version with the same or a higher minor one; NULL for none. */
static const cuda_code *code_for(uint32_t gpu) {
    const cuda_code *best = NULL;
    for (uint32_t i = 0; i < pumice_cuda.code_count; i++) {
        const cuda_code *code = &pumice_cuda.code[i];
        const uint32_t made_for = code->architecture;
        const bool runs = made_for == gpu || (made_for / 10 == gpu / 10 && made_for < gpu && !is_tegra(made_for) &&
                                              !is_tegra(gpu));
        if (runs && (!best || made_for > best->architecture)) best = code;
    }
    return best;
}

/* The first GPU that there is code for. */
static pumice_status find_gpu(device *device, report to) {
    const cuda_driver *driver = &device->driver;
    char name[NAME] = "";
    uint32_t gpu = 0;
    int count = 0;
    if (driver->cuDeviceGetCount(&count) || count == 0)
        return fail(to, PUMICE_NO_DEVICE, "NVIDIA's driver is there, and no GPU: see what nvidia-smi says, and whether "
                                          "CUDA_VISIBLE_DEVICES hides it");
    for (int i = count; i-- > 0;) {
        int number, major, minor;
        if (driver->cuDeviceGet(&number, i) || driver->cuDeviceGetAttribute(&major, CUDA_MAJOR, number) ||
            driver->cuDeviceGetAttribute(&minor, CUDA_MINOR, number))
            continue;
        const cuda_code *code = code_for(gpu = 10 * (uint32_t)major + (uint32_t)minor);
        if (code) {
            device->cubin = pumice_cubins + code->offset;
            device->number = number;
        } else if (driver->cuDeviceGetName(name, sizeof name, number)) {
            name[0] = 0;
        }
    }
    if (device->cubin) return PUMICE_OK;
    return fail(to, PUMICE_NO_DEVICE,
                "this model was compiled for %s, and the GPU here, %s, is sm_%u: compile it for that",
                pumice_model.target, name, gpu);
}

/* The context, which becomes current, memory, weights, code and the graph. */
static pumice_status prepare(device *device, report to) {
    const cuda_driver *driver = &device->driver;
    for (uint32_t i = 0; i <= buffer_count(); i++) device->offsets[i] = offset_of(i);
    const uint64_t size = device->offsets[buffer_count()], staged = size - device->offsets[FIRST_INPUT];
    pumice_status status;
    int error = driver->cuDevicePrimaryCtxRetain(&device->context, device->number);
    if (error) device->context = NULL;
    if (!error) error = driver->cuCtxPushCurrent_v2(device->context);
    if (error) return check(device, error, "the GPU cannot be used", to);
    if ((error = driver->cuMemAlloc_v2(&device->memory, size ? size : 1))) {
        device->memory = 0;
        return check(device, error, "the GPU has not enough memory", to);
    }
    if ((error = driver->cuMemAllocHost_v2((void **)&device->staging, staged ? staged : 1))) {
        device->staging = NULL;
        return check(device, error, "no memory that the GPU can read is left", to);
    }
    memset(device->staging, 0, staged);
    if (pumice_cuda.weights)
        error = driver->cuMemcpyHtoD_v2(device->memory + device->offsets[WEIGHTS], pumice_weights, pumice_cuda.weights);
    if (!error) error = driver->cuModuleLoadData(&device->module, device->cubin);
    if (!error) error = driver->cuStreamCreate(&device->stream, CUDA_NON_BLOCKING);
    for (uint32_t i = 0; !error && i < pumice_cuda.launch_count; i++)
        error = driver->cuModuleGetFunction(&device->kernels[i], device->module, pumice_cuda.launches[i].kernel);
    status = check(device, error, "the model cannot be loaded into the GPU", to);
    return status == PUMICE_OK ? capture(device, to) : status;
}

/* A whole run as one graph, if the driver has all of these functions. */
static pumice_status capture(device *device, report to) {
    const cuda_driver *driver = &device->driver;
    void *const *slots = (void *const *)driver;
    for (int i = REQUIRED; i < FUNCTIONS; i++)
        if (!slots[i]) return PUMICE_OK;
    void *graph = NULL;
    int error = driver->cuStreamBeginCapture_v2(device->stream, CUDA_CAPTURE_RELAXED);
    if (error) return check(device, error, "the steps cannot be captured", to);
    const pumice_status status = enqueue(device, 0, pumice_model.step_count, to);
    error = driver->cuStreamEndCapture(device->stream, &graph);
    if (!error && status == PUMICE_OK) error = driver->cuGraphInstantiateWithFlags(&device->graph, graph, 0);
    if (error) device->graph = NULL;
    if (graph) driver->cuGraphDestroy(graph);
    return status == PUMICE_OK ? check(device, error, "the steps cannot be captured", to) : status;
}

/* Put one copy in, the steps and one copy out on the stream. */
static pumice_status enqueue(device *device, uint32_t first, uint32_t last, report to) {
    const cuda_driver *driver = &device->driver;
    const uint64_t inputs = device->offsets[FIRST_INPUT], end = device->offsets[buffer_count()];
    const uint64_t outputs = device->offsets[FIRST_INPUT + pumice_model.input_count], given = outputs - inputs;
    int error = 0;
    if (given) error = driver->cuMemcpyHtoDAsync_v2(device->memory + inputs, device->staging, given, device->stream);
    if (error) return check(device, error, "the inputs cannot be copied", to);
    for (uint32_t i = 0; i < pumice_cuda.launch_count; i++) {
        const cuda_launch *launch = &pumice_cuda.launches[i];
        if (launch->step < first || launch->step >= last) continue;
        const uint32_t count = launch->end_of_arguments - launch->first_argument;
        for (uint32_t j = 0; j < count; j++) {
            const cuda_argument *argument = &pumice_cuda.arguments[launch->first_argument + j];
            device->addresses[j] = device->memory + device->offsets[argument->buffer] + argument->offset;
            device->arguments[j] = &device->addresses[j];
        }
        const uint32_t *grid = launch->grid, *block = launch->block;
        error = driver->cuLaunchKernel(device->kernels[i], grid[0], grid[1], grid[2], block[0], block[1], block[2],
                                       launch->shared_bytes, device->stream, device->arguments, NULL);
        if (error) return check(device, error, pumice_model.steps[launch->step].name, to);
    }
    if (end > outputs)
        error = driver->cuMemcpyDtoHAsync_v2(device->staging + given, device->memory + outputs,
                                             end - outputs, device->stream);
    return check(device, error, "the outputs cannot be copied", to);
}
