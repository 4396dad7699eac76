/* The C interface, whatever the device: describing the model, checking arguments, errors, verification. */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model.h"

enum { MOST_THREADS = 1024 };

struct pumice_instance {
    device *device;
    char error[PUMICE_MESSAGE];
};

typedef unsigned long long ull; /* what printf takes for uint64_t everywhere */

static pumice_status check_buffers(const char *kind, const void *const *buffers, const pumice_tensor *tensors,
                                   uint32_t count, report to);
static pumice_status verify(pumice_instance *instance, void *const *outputs, void *result, uint32_t *wrong, report to);
static report report_of(pumice_instance *instance);

uint32_t pumice_abi(void) { return PUMICE_ABI; }
const char *pumice_manifest(void) { return pumice_manifest_text; }
uint32_t pumice_input_count(void) { return pumice_model.input_count; }
uint32_t pumice_output_count(void) { return pumice_model.output_count; }
uint32_t pumice_step_count(void) { return pumice_model.step_count; }

const pumice_tensor *pumice_input(uint32_t index) {
    return index < pumice_model.input_count ? &pumice_model.inputs[index] : NULL;
}

const pumice_tensor *pumice_output(uint32_t index) {
    return index < pumice_model.output_count ? &pumice_model.outputs[index] : NULL;
}

const char *pumice_step_layer(uint32_t step) {
    return step < pumice_model.step_count ? pumice_model.steps[step].name : NULL;
}

uint64_t pumice_memory(uint32_t threads) {
    if (threads < 1 || threads > MOST_THREADS) return 0;
    return sizeof(pumice_instance) + device_memory(threads);
}

pumice_status pumice_open(uint32_t threads, pumice_instance **opened, char *message, uint64_t message_size) {
    const report to = {message, message_size};
    if (!opened) return fail(to, PUMICE_BAD_ARGUMENT, "pumice_open was given no place for the instance");
    *opened = NULL;
    if (threads < 1 || threads > MOST_THREADS)
        return fail(to, PUMICE_BAD_ARGUMENT, "the thread count is %u: give 1 to %d", threads, MOST_THREADS);
    pumice_instance *instance = calloc(1, sizeof *instance);
    if (!instance) return fail(to, PUMICE_NO_MEMORY, "no memory is left for an instance");
    const pumice_status status = device_open(threads, &instance->device, to);
    if (status == PUMICE_OK)
        *opened = instance;
    else
        free(instance);
    return status;
}

pumice_status pumice_run(pumice_instance *instance, const void *const *inputs, void *const *outputs) {
    return pumice_run_steps(instance, inputs, outputs, 0, pumice_model.step_count);
}

pumice_status pumice_run_steps(pumice_instance *instance, const void *const *inputs, void *const *outputs,
                               uint32_t first, uint32_t last) {
    const model_tables *model = &pumice_model;
    if (!instance) return PUMICE_BAD_ARGUMENT;
    const report to = report_of(instance);
    if (first > last || last > model->step_count)
        return fail(to, PUMICE_BAD_ARGUMENT, "the model has steps 0 to %u, and %u to %u were asked for",
                    model->step_count, first, last);
    pumice_status status = check_buffers("input", inputs, model->inputs, model->input_count, to);
    if (status == PUMICE_OK)
        status = check_buffers("output", (const void *const *)outputs, model->outputs, model->output_count, to);
    return status == PUMICE_OK ? device_run(instance->device, inputs, outputs, first, last, to) : status;
}

pumice_status pumice_verify(pumice_instance *instance, uint32_t *first_wrong_step) {
    const model_tables *model = &pumice_model;
    if (!instance) return PUMICE_BAD_ARGUMENT;
    const report to = report_of(instance);
    if (!model->check) return fail(to, PUMICE_BAD_ARGUMENT, "this library stores no input to verify its numbers with");
    uint64_t largest = 1; /* result of a step */
    for (uint32_t i = 0; i < model->step_count; i++)
        for (uint32_t j = model->steps[i].first_result; j < model->steps[i].end_of_results; j++)
            if (model->results[j].bytes > largest) largest = model->results[j].bytes;
    void *result = malloc(largest);
    void **outputs = calloc(model->output_count + 1, sizeof *outputs);
    bool enough = result && outputs;
    for (uint32_t i = 0; enough && i < model->output_count; i++)
        enough = (outputs[i] = calloc(1, model->outputs[i].bytes + 1)) != NULL;
    uint32_t wrong = 0;
    const pumice_status status = enough ? verify(instance, outputs, result, &wrong, to)
                                        : fail(to, PUMICE_NO_MEMORY, "no memory is left to verify with");
    for (uint32_t i = 0; outputs && i < model->output_count; i++) free(outputs[i]);
    free(outputs);
    free(result);
    if (status == PUMICE_DIFFERS && first_wrong_step) *first_wrong_step = wrong;
    return status;
}

const char *pumice_error(const pumice_instance *instance) {
    return instance ? instance->error : "the instance is NULL: pumice_open failed, or was not called";
}

void pumice_close(pumice_instance *instance) {
    if (!instance) return;
    device_close(instance->device);
    free(instance);
}

pumice_status fail(report to, pumice_status status, const char *format, ...) {
    va_list values;
    va_start(values, format);
    if (to.text && to.size) vsnprintf(to.text, to.size, format, values);
    va_end(values);
    return status;
}

static report report_of(pumice_instance *instance) { return (report){instance->error, sizeof instance->error}; }

static uint64_t elements(const pumice_tensor *tensor) {
    uint64_t count = 1;
    for (uint32_t i = 0; i < tensor->rank; i++) count *= tensor->shape[i];
    return count;
}

/* Every buffer must be there, and lie as its type must. */
static pumice_status check_buffers(const char *kind, const void *const *buffers, const pumice_tensor *tensors,
                                   uint32_t count, report to) {
    for (uint32_t i = 0; i < count; i++) {
        if (!buffers || !buffers[i])
            return fail(to, PUMICE_BAD_ARGUMENT, "%s %u ('%s') is NULL", kind, i, tensors[i].name);
        const uint64_t size = tensors[i].bytes ? tensors[i].bytes / elements(&tensors[i]) : 1; /* of an element */
        if (size > 1 && (uintptr_t)buffers[i] % size)
            return fail(to, PUMICE_BAD_ARGUMENT, "%s %u ('%s') is not aligned to the %llu bytes of a %s", kind, i,
                        tensors[i].name, (ull)size, tensors[i].dtype);
    }
    return PUMICE_OK;
}

#define START 0xcbf29ce484222325u

/* FNV-1a over words instead of bytes, with the high half folded in; the last word is filled up with zeros. */
static uint64_t checksum(uint64_t hash, const uint8_t *bytes, uint64_t count) {
    for (uint64_t at = 0; at < count; at += sizeof hash) {
        uint64_t word = 0;
        memcpy(&word, bytes + at, count - at < sizeof word ? count - at : sizeof word);
        hash = (hash ^ word) * 0x100000001b3;
        hash ^= hash >> 32;
    }
    return hash;
}

/* Reading element `index` of each type as a number. */
#define READER(type, name) \
    static double name##_at(const void *data, uint64_t index) { return (double)((const type *)data)[index]; }
READER(float, float32)
READER(double, float64)
READER(int8_t, int8)
READER(uint8_t, uint8)
READER(int16_t, int16)
READER(uint16_t, uint16)
READER(int32_t, int32)
READER(uint32_t, uint32)
READER(int64_t, int64)
READER(uint64_t, uint64)

typedef double (*reader)(const void *data, uint64_t index);

/* NULL for a type whose elements are only the same or not. */
static reader reader_of(const char *dtype) {
    static const struct {
        const char *dtype;
        reader read;
    } known[] = {{"float32", float32_at}, {"float64", float64_at}, {"int8", int8_at},   {"uint8", uint8_at},
                 {"int16", int16_at},     {"uint16", uint16_at},   {"int32", int32_at}, {"uint32", uint32_at},
                 {"int64", int64_at},     {"uint64", uint64_at}};
    for (unsigned i = 0; i < sizeof known / sizeof *known; i++)
        if (strcmp(dtype, known[i].dtype) == 0) return known[i].read;
    return NULL;
}

/* Whether two outputs agree: floats within the tolerance, integers within one, everything else to the byte. */
static bool agree(const pumice_tensor *tensor, const void *got, const void *expected) {
    const reader read = reader_of(tensor->dtype);
    if (!read) return memcmp(got, expected, tensor->bytes) == 0;
    const uint64_t count = elements(tensor);
    double limit = 1;
    if (tensor->dtype[0] == 'f') {
        limit = 0;
        for (uint64_t i = 0; i < count; i++)
            if (isfinite(read(expected, i))) limit = fmax(limit, fabs(read(expected, i)));
        limit *= pumice_model.tolerance;
    }
    for (uint64_t i = 0; i < count; i++) {
        const double a = read(got, i), b = read(expected, i);
        if (a != b && !(isnan(a) && isnan(b)) && !(fabs(a - b) <= limit)) return false;
    }
    return true;
}

/* The last step that writes an output. */
static uint32_t writer_of(uint32_t output) {
    const model_tables *model = &pumice_model;
    for (uint32_t step = model->step_count; step-- > 0;)
        for (uint32_t j = model->steps[step].first_result; j < model->steps[step].end_of_results; j++)
            if (model->results[j].buffer == FIRST_INPUT + model->input_count + output) return step;
    return 0;
}

static pumice_status verify_step(pumice_instance *instance, void *const *outputs, void *result, uint32_t number,
                                 report to) {
    const model_step *step = &pumice_model.steps[number];
    uint64_t hash = START;
    for (uint32_t j = step->first_result; j < step->end_of_results; j++) {
        const model_view *view = &pumice_model.results[j];
        const pumice_status status = device_read(instance->device, outputs, view, result, to);
        if (status != PUMICE_OK) return status;
        hash = checksum(hash, result, view->bytes);
    }
    if (hash == step->checksum) return PUMICE_OK;
    return fail(to, PUMICE_DIFFERS,
                "step %u (%s) gives other numbers here than where the model was compiled: checksum %016llx, not %016llx",
                number, step->name, (ull)hash, (ull)step->checksum);
}

/* What the library holds, before any of it is used: a kernel that is given a damaged list would read anywhere. */
static pumice_status verify_data(uint32_t *wrong, report to) {
    const model_tables *model = &pumice_model;
    for (uint32_t i = 0; i < model->piece_count; i++) {
        const model_piece *piece = &model->pieces[i];
        if (checksum(START, pumice_weights + piece->offset, piece->bytes) == piece->checksum) continue;
        *wrong = piece->step;
        return fail(to, PUMICE_DIFFERS, "the weights of step %u (%s) are damaged: copy or compile the library again",
                    piece->step, model->steps[piece->step].name);
    }
    *wrong = 0;
    if (checksum(START, pumice_check, model->check_bytes) == model->check_checksum) return PUMICE_OK;
    return fail(to, PUMICE_DIFFERS, "the stored input is damaged: copy or compile the library again");
}

static pumice_status verify(pumice_instance *instance, void *const *outputs, void *result, uint32_t *wrong, report to) {
    const model_tables *model = &pumice_model;
    pumice_status status = verify_data(wrong, to);
    if (status != PUMICE_OK) return status;
    const void **inputs = calloc(model->input_count + 1, sizeof *inputs);
    if (!inputs) return fail(to, PUMICE_NO_MEMORY, "no memory is left to verify with");
    for (uint32_t i = 0; i < model->input_count; i++) inputs[i] = pumice_check + model->check[i];
    status = device_clear(instance->device, to);
    for (*wrong = 0; status == PUMICE_OK && *wrong < model->step_count; ++*wrong) {
        status = device_run(instance->device, inputs, outputs, *wrong, *wrong + 1, to);
        if (status == PUMICE_OK && *wrong < model->exact_steps)
            status = verify_step(instance, outputs, result, *wrong, to);
        if (status != PUMICE_OK) break;
    }
    free(inputs);
    if (model->exact_steps >= model->step_count) return status; /* the checksums have covered the outputs */
    for (uint32_t i = 0; status == PUMICE_OK && i < model->output_count; i++) {
        if (agree(&model->outputs[i], outputs[i], pumice_check + model->check[model->input_count + i])) continue;
        *wrong = writer_of(i);
        status = fail(to, PUMICE_DIFFERS, "output '%s' is not what it was where the model was compiled",
                      model->outputs[i].name);
    }
    return status;
}
