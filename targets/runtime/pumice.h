/* Pumice's C interface, version 1: a compiled model is one shared library, and these are its functions.
 *
 *     pumice_instance *instance;
 *     char message[PUMICE_MESSAGE];
 *     if (pumice_open(1, &instance, message, sizeof message) != PUMICE_OK)
 *         ...                                             message says what is wrong
 *     const void *inputs[] = {image};                     in the order of pumice_input(0), pumice_input(1), ...
 *     void *outputs[] = {logits};                         the caller's buffers
 *     if (pumice_run(instance, inputs, outputs) != PUMICE_OK)
 *         ...                                             pumice_error(instance) says what is wrong
 *     pumice_close(instance);
 *
 * Link the library, or open it with dlopen. Every model exports the same names, so a program with several models opens
 * each with dlopen(path, RTLD_NOW | RTLD_LOCAL) and finds its functions with dlsym.
 *
 * The library has no global state: the weights are read-only and shared by all instances, and an instance has memory
 * and threads of its own. Different threads may use different instances at the same time; one instance serves one caller
 * at a time. pumice_run allocates nothing. Close every instance before dlclose.
 *
 * Within one value of PUMICE_ABI functions and status codes may be added; nothing that is here changes.
 */
#ifndef PUMICE_H
#define PUMICE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PUMICE_ABI 1
#define PUMICE_MESSAGE 512 /* bytes that hold any message, with its final NUL */

#if defined(__GNUC__) || defined(__clang__)
#define PUMICE_API __attribute__((visibility("default")))
#else
#define PUMICE_API
#endif

typedef enum {
    PUMICE_OK = 0,
    PUMICE_BAD_ARGUMENT = 1,  /* a NULL, a count or a step out of range, a buffer that is not aligned to its type */
    PUMICE_NO_MEMORY = 2,
    PUMICE_NO_THREADS = 3,    /* the system gave no more; or the process forked, and threads stay with the parent */
    PUMICE_WRONG_CPU = 4,     /* this CPU lacks instructions that the model was compiled for */
    PUMICE_NO_DEVICE = 5,     /* a model for a GPU, and no driver or no such GPU */
    PUMICE_DEVICE_FAILED = 6, /* a step failed */
    PUMICE_DIFFERS = 7        /* pumice_verify found numbers other than those stored */
} pumice_status;

/* An input or output. `name` is UTF-8, `dtype` as NumPy calls it ("float32", "uint8", "int64"); dense, row-major. */
typedef struct {
    const char *name, *dtype;
    uint64_t bytes;
    uint32_t rank;
    const uint64_t *shape; /* `rank` sizes */
} pumice_tensor;

typedef struct pumice_instance pumice_instance;

/* Describing a model: these need no instance, run on any CPU of the architecture and give pointers into the library. */

/* The version of this interface that the library was built with: compare it with PUMICE_ABI. */
PUMICE_API uint32_t pumice_abi(void);

/* All that is known about the model as JSON: target, layers, quantization, versions. */
PUMICE_API const char *pumice_manifest(void);

/* The inputs and outputs by number; NULL for a number out of range. */
PUMICE_API uint32_t pumice_input_count(void);
PUMICE_API const pumice_tensor *pumice_input(uint32_t index);
PUMICE_API uint32_t pumice_output_count(void);
PUMICE_API const pumice_tensor *pumice_output(uint32_t index);

/* The kernels in the order in which they run, and the layer that each computes; the kernel's own name between layers.
 * NULL for a number out of range. */
PUMICE_API uint32_t pumice_step_count(void);
PUMICE_API const char *pumice_step_layer(uint32_t step);

/* Bytes that pumice_open allocates for so many threads, their stacks aside; 0 for a count that it refuses. */
PUMICE_API uint64_t pumice_memory(uint32_t threads);

/* Running a model. */

/* Make an instance that runs on `threads` threads, from 1 to 1024: the caller's own and as many of the instance's as are
 * missing. `*instance` is NULL on failure, and `message`, unless NULL, then holds a sentence, cut off at `message_size`. */
PUMICE_API pumice_status pumice_open(uint32_t threads, pumice_instance **instance, char *message, uint64_t message_size);

/* Run the model once: read `inputs`, write `outputs`, arrays of pointers in the order of pumice_input, pumice_output.
 * A buffer needs the alignment of its type and must not overlap an output. */
PUMICE_API pumice_status pumice_run(pumice_instance *instance, const void *const *inputs, void *const *outputs);

/* Run the steps from `first` up to but without `last`, to time them. They read what the steps before them left. */
PUMICE_API pumice_status pumice_run_steps(pumice_instance *instance, const void *const *inputs, void *const *outputs,
                                          uint32_t first, uint32_t last);

/* Compare the weights with what was compiled, then run the model on an input that it stores and compare what each step
 * writes with what it wrote on the machine that compiled it. On PUMICE_DIFFERS `*first_wrong_step`, unless NULL, is the
 * first step with other weights, or else with other numbers. Steps that call
 * functions of libm, which differ between systems, and those after them are compared by the model's outputs, within a
 * tolerance. This allocates memory and frees it again. */
PUMICE_API pumice_status pumice_verify(pumice_instance *instance, uint32_t *first_wrong_step);

/* A sentence about the last failure of this instance; empty when there was none. Valid until the next call with it. */
PUMICE_API const char *pumice_error(const pumice_instance *instance);

/* End the instance's threads and free its memory. NULL is allowed. */
PUMICE_API void pumice_close(pumice_instance *instance);

#ifdef __cplusplus
}
#endif

#endif
