/* Inside a library: what the compiler says of the model (model.c, which it writes, and sections of data), and what
 * runs it (cpu.c or cuda.c). Not for users. */
#ifndef PUMICE_MODEL_H
#define PUMICE_MODEL_H

#include <stdbool.h>
#include <stdint.h>

#include "pumice.h"

/* Bytes in one of the buffers: weights, workspace, scratch, then the inputs, then the outputs. */
typedef struct {
    uint32_t buffer;
    uint64_t offset, bytes;
} model_view;

enum { WEIGHTS, WORKSPACE, SCRATCH, FIRST_INPUT };

typedef struct {
    const char *name;
    uint64_t checksum;                    /* of its results, one after the other */
    uint32_t first_result, end_of_results; /* of model.results */
} model_step;

/* Some of the weights, and the first step that reads them. */
typedef struct {
    uint64_t offset, bytes, checksum;
    uint32_t step;
} model_piece;

typedef struct {
    uint32_t input_count, output_count, step_count, piece_count, feature_count;
    const pumice_tensor *inputs, *outputs;
    const model_step *steps;
    const model_view *results;
    const model_piece *pieces;
    const char *const *features;  /* that the CPU must have, in /proc/cpuinfo's words */
    const char *target;           /* as the user called it */
    uint64_t workspace, scratch;  /* bytes; of scratch for each task */
    uint32_t exact_steps;         /* how many give the same bytes everywhere: those before the first call of libm */
    double tolerance;             /* of float outputs after such a call, times the largest number of each */
    const uint64_t *check;        /* where in pumice_check each input lies, then each output unless all steps are exact;
                                     NULL: nothing is stored */
    uint64_t check_bytes, check_checksum; /* of all that is stored there */
} model_tables;

extern const model_tables pumice_model;
extern const char pumice_manifest_text[];
extern const uint8_t pumice_check[];
extern PUMICE_API const uint8_t pumice_weights[];

/* The generated code: runs steps first..last-1, of each the share of `task` out of `tasks`. */
int32_t pumice_steps(void **buffers, int32_t first, int32_t last, int32_t task, int32_t tasks);

/* Where a failure's sentence goes. */
typedef struct {
    char *text;
    uint64_t size;
} report;

/* Write the sentence and give `status` back. */
__attribute__((format(printf, 3, 4))) pumice_status fail(report to, pumice_status status, const char *format, ...);

/* What runs the steps, one for each instance. `inputs` and `outputs` are the caller's, checked. */
typedef struct device device;

uint64_t device_memory(uint32_t threads);
pumice_status device_open(uint32_t threads, device **opened, report to);
pumice_status device_run(device *device, const void *const *inputs, void *const *outputs, uint32_t first, uint32_t last,
                         report to);
/* Fill the workspace with zeros. */
pumice_status device_clear(device *device, report to);
/* Copy what a step wrote; `outputs` are those of the run. */
pumice_status device_read(device *device, void *const *outputs, const model_view *view, void *into, report to);
void device_close(device *device);

#endif
