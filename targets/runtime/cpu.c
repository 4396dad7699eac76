/* A CPU that runs the steps: memory, threads, and the check that it has the instructions.
 *
 * The threads of an instance go through the steps together, each with its share, and meet after each. Whoever waits spins
 * for a moment, then lets others run, then sleeps: so a run on idle cores loses little time, one on cores that others
 * use goes on, and an instance that nobody calls costs nothing.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "cpu_features.h"
#include "model.h"

enum {
    SPINS = 1000,        /* with the CPU's own hint to wait: tens of microseconds */
    YIELDS = 2000,       /* then calls of sched_yield: about a millisecond on an idle core */
    LINE = 64,           /* bytes of a cache line, to which buffers are aligned as well */
    HUGE_PAGE = 2 << 20, /* bytes: memory from here on asks for such pages */
    STACK = 512 << 10,   /* bytes of a thread's; kernels keep a few kilobytes there */
    FUTEX_WAIT = 128,    /* FUTEX_WAIT_PRIVATE and FUTEX_WAKE_PRIVATE of linux/futex.h, which musl comes without */
    FUTEX_WAKE = 129,
};

/* A number that only grows, and that threads wait for. */
typedef struct {
    _Alignas(LINE) atomic_uint value;
    atomic_uint sleepers;
} counter;

typedef struct {
    device *device;
    uint32_t task;
    pthread_t thread; /* but for task 0, which runs on the caller's */
    void **buffers;   /* the table for pumice_steps, with this task's scratch */
} worker;

struct device {
    counter jobs;                       /* given to the threads */
    counter rounds;                     /* steps that all threads are through with */
    _Alignas(LINE) atomic_uint arrived; /* threads that are through with the step at hand */
    atomic_uint failed;                 /* 0, or 1 + a step that did */
    _Alignas(LINE) uint32_t tasks;
    uint32_t first, last; /* the job */
    const void *const *inputs;
    void *const *outputs;
    bool is_over;
    pid_t process; /* that has the threads */
    uint64_t size; /* bytes of all memory: one mapping that begins here */
    worker workers[];
};

static pumice_status check_cpu(report to);
static uint32_t start_threads(device *device);
static void end_threads(device *device, uint32_t tasks);
static void run_share(worker *self);
static void announce(counter *counter);
static unsigned wait_beyond(counter *counter, unsigned seen);

static uint64_t lines(uint64_t bytes) { return (bytes + LINE - 1) / LINE * LINE; }
static uint64_t header_bytes(uint32_t threads) { return lines(sizeof(device) + threads * sizeof(worker)); }
static uint64_t table_bytes(void) {
    return lines((FIRST_INPUT + (uint64_t)pumice_model.input_count + pumice_model.output_count) * sizeof(void *));
}

uint64_t device_memory(uint32_t threads) {
    const model_tables *model = &pumice_model;
    return header_bytes(threads) + lines(model->workspace) + threads * (table_bytes() + lines(model->scratch));
}

pumice_status device_open(uint32_t threads, device **opened, report to) {
    const pumice_status status = check_cpu(to);
    if (status != PUMICE_OK) return status;
    const uint64_t size = device_memory(threads);
    device *device = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (device == MAP_FAILED)
        return fail(to, PUMICE_NO_MEMORY, "the system gave no %llu bytes of memory", (unsigned long long)size);
    if (size >= HUGE_PAGE) madvise(device, size, MADV_HUGEPAGE); /* without such pages it is only slower */
    memset(device, 0, size); /* now, so that no run waits for the system to find the pages */
    device->tasks = threads;
    device->process = getpid();
    device->size = size;
    uint8_t *workspace = (uint8_t *)device + header_bytes(threads);
    uint8_t *place = workspace + lines(pumice_model.workspace);
    for (uint32_t task = 0; task < threads; task++) {
        worker *worker = &device->workers[task];
        worker->device = device;
        worker->task = task;
        worker->buffers = (void **)place;
        worker->buffers[WEIGHTS] = (void *)pumice_weights; /* read-only: writing there is a fault */
        worker->buffers[WORKSPACE] = workspace;
        worker->buffers[SCRATCH] = place + table_bytes();
        place += table_bytes() + lines(pumice_model.scratch);
    }
    const uint32_t tasks = start_threads(device);
    if (tasks < threads) {
        end_threads(device, tasks);
        munmap(device, size);
        return fail(to, PUMICE_NO_THREADS, "the system gave %u of %u threads: open with fewer", tasks, threads);
    }
    *opened = device;
    return PUMICE_OK;
}

pumice_status device_run(device *device, const void *const *inputs, void *const *outputs, uint32_t first, uint32_t last,
                         report to) {
    if (first >= last) return PUMICE_OK;
    if (device->tasks > 1 && device->process != getpid())
        return fail(to, PUMICE_NO_THREADS, "the process forked after pumice_open, and its threads stayed behind: open "
                                           "an instance in the child");
    device->first = first;
    device->last = last;
    device->inputs = inputs;
    device->outputs = outputs;
    atomic_store(&device->failed, 0);
    if (device->tasks > 1) announce(&device->jobs);
    run_share(&device->workers[0]);
    const uint32_t failed = atomic_load(&device->failed);
    if (!failed) return PUMICE_OK;
    if (device->tasks == 1) return fail(to, PUMICE_DEVICE_FAILED, "a step failed");
    return fail(to, PUMICE_DEVICE_FAILED, "step %u (%s) failed", failed - 1, pumice_model.steps[failed - 1].name);
}

pumice_status device_clear(device *device, report to) {
    (void)to;
    memset(device->workers[0].buffers[WORKSPACE], 0, pumice_model.workspace);
    return PUMICE_OK;
}

pumice_status device_read(device *device, void *const *outputs, const model_view *view, void *into, report to) {
    (void)to;
    const uint32_t first_output = FIRST_INPUT + pumice_model.input_count;
    const uint8_t *buffer =
        view->buffer >= first_output ? outputs[view->buffer - first_output] : device->workers[0].buffers[view->buffer];
    memcpy(into, buffer + view->offset, view->bytes);
    return PUMICE_OK;
}

void device_close(device *device) {
    if (device->process == getpid()) end_threads(device, device->tasks);
    munmap(device, device->size);
}

/* The instructions that the model needs; asked of the CPU itself, since /proc may not be there. */
static pumice_status check_cpu(report to) {
    char missing[PUMICE_MESSAGE / 2] = "";
    size_t length = 0;
    for (uint32_t i = 0; i < pumice_model.feature_count; i++)
        if (!cpu_has(pumice_model.features[i]) && length < sizeof missing)
            length += (size_t)snprintf(missing + length, sizeof missing - length, "%s%s", length ? ", " : "",
                                       pumice_model.features[i]);
    if (!length) return PUMICE_OK;
    return fail(to, PUMICE_WRONG_CPU, "this CPU lacks %s, for which the model was compiled (target %s): compile it for "
                                      "this CPU", missing, pumice_model.target);
}

static void *work(void *argument) {
    worker *self = argument;
    device *device = self->device;
    for (unsigned job = 0;;) {
        job = wait_beyond(&device->jobs, job);
        if (device->is_over) return NULL;
        run_share(self);
    }
}

/* Start all tasks but the first; how many tasks there are then. The program's signals are not for these threads. */
static uint32_t start_threads(device *device) {
    uint32_t tasks = 1;
    sigset_t all, before;
    pthread_attr_t attributes;
    if (device->tasks == 1 || pthread_attr_init(&attributes) != 0) return tasks;
    pthread_attr_setstacksize(&attributes, STACK);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (; tasks < device->tasks; tasks++)
        if (pthread_create(&device->workers[tasks].thread, &attributes, work, &device->workers[tasks]) != 0) break;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return tasks;
}

static void end_threads(device *device, uint32_t tasks) {
    device->is_over = true;
    announce(&device->jobs);
    for (uint32_t task = 1; task < tasks; task++) pthread_join(device->workers[task].thread, NULL);
}

static void run_steps(worker *self, uint32_t first, uint32_t last) {
    device *device = self->device;
    if (pumice_steps(self->buffers, (int32_t)first, (int32_t)last, (int32_t)self->task, (int32_t)device->tasks) != 0)
        atomic_store(&device->failed, first + 1);
}

/* Come to the end of a step, and wait for the others. */
static void meet(device *device) {
    const unsigned round = atomic_load(&device->rounds.value);
    if (atomic_fetch_add(&device->arrived, 1) + 1 == device->tasks) {
        atomic_store(&device->arrived, 0); /* before anyone goes on to the next step */
        announce(&device->rounds);
    } else {
        wait_beyond(&device->rounds, round);
    }
}

/* One task's part of the job. The last meeting tells the caller that all are through; nobody reads the job after it. */
static void run_share(worker *self) {
    device *device = self->device;
    void **table = self->buffers + FIRST_INPUT;
    for (uint32_t i = 0; i < pumice_model.input_count; i++) *table++ = (void *)device->inputs[i];
    for (uint32_t i = 0; i < pumice_model.output_count; i++) *table++ = device->outputs[i];
    const uint32_t first = device->first, last = device->last;
    if (device->tasks == 1) {
        run_steps(self, first, last);
        return;
    }
    for (uint32_t step = first; step < last; step++) {
        run_steps(self, step, step + 1);
        meet(device);
    }
}

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb" ::: "memory"); /* `yield` does nothing on most cores */
#endif
}

static long futex(counter *counter, int operation, unsigned value) {
    return syscall(SYS_futex, &counter->value, operation, value, NULL, NULL, 0);
}

/* Count on, and wake who sleeps: either this sees the sleeper, or the sleeper's call sees the new value. */
static void announce(counter *counter) {
    atomic_fetch_add(&counter->value, 1);
    if (atomic_load(&counter->sleepers)) futex(counter, FUTEX_WAKE, INT_MAX);
}

/* Wait until the counter is no longer `seen`; its value then. */
static unsigned wait_beyond(counter *counter, unsigned seen) {
    unsigned value;
    for (int i = 0; i < SPINS + YIELDS; i++) {
        if ((value = atomic_load_explicit(&counter->value, memory_order_acquire)) != seen) return value;
        if (i < SPINS)
            relax();
        else
            sched_yield();
    }
    atomic_fetch_add(&counter->sleepers, 1);
    while ((value = atomic_load(&counter->value)) == seen) futex(counter, FUTEX_WAIT, seen);
    atomic_fetch_sub(&counter->sleepers, 1);
    return value;
}
