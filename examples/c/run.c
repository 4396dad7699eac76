/* Runs a compiled model from C: raw input files in, outputs on the terminal.
 *
 *     cc -std=c11 -O2 -I ../../targets/runtime run.c -o run -ldl
 *     ./run ./model.so image.bin            one file for each input: its elements, row-major, nothing else
 *     ./run -t 2 ./model.so image.bin       on two threads
 *     ./run -v ./model.so                   verify the numbers on this machine
 *     ./run ./model.so                      say what the model takes and gives
 */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pumice.h"

/* The functions of one library. With a single model, link it instead and call them by their names. */
typedef struct {
    void *library;
    uint32_t (*abi)(void);
    uint32_t (*input_count)(void);
    uint32_t (*output_count)(void);
    const pumice_tensor *(*input)(uint32_t index);
    const pumice_tensor *(*output)(uint32_t index);
    const char *(*step_layer)(uint32_t step);
    pumice_status (*open)(uint32_t threads, pumice_instance **instance, char *message, uint64_t message_size);
    pumice_status (*run)(pumice_instance *instance, const void *const *inputs, void *const *outputs);
    pumice_status (*verify)(pumice_instance *instance, uint32_t *first_wrong_step);
    const char *(*error)(const pumice_instance *instance);
    void (*close)(pumice_instance *instance);
} model;

static void stop(const char *what, const char *why) {
    fprintf(stderr, "run: %s: %s\n", what, why);
    exit(1);
}

static void *find(void *library, const char *name) {
    void *function = dlsym(library, name);
    if (!function) stop(name, "is not in this file: it is no library that Pumice compiled");
    return function;
}

static model load(const char *path) {
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL); /* LOCAL: other models have the same names */
    if (!library) stop(path, dlerror());
    model model = {.library = library};
    *(void **)&model.abi = find(library, "pumice_abi");
    *(void **)&model.input_count = find(library, "pumice_input_count");
    *(void **)&model.output_count = find(library, "pumice_output_count");
    *(void **)&model.input = find(library, "pumice_input");
    *(void **)&model.output = find(library, "pumice_output");
    *(void **)&model.step_layer = find(library, "pumice_step_layer");
    *(void **)&model.open = find(library, "pumice_open");
    *(void **)&model.run = find(library, "pumice_run");
    *(void **)&model.verify = find(library, "pumice_verify");
    *(void **)&model.error = find(library, "pumice_error");
    *(void **)&model.close = find(library, "pumice_close");
    if (model.abi() != PUMICE_ABI) stop(path, "has another version of the C interface than this program");
    return model;
}

static void *allocate(uint64_t bytes) {
    void *memory = malloc(bytes ? bytes : 1); /* malloc aligns to any type, and the model wants no more */
    if (!memory) stop("malloc", "no memory is left");
    return memory;
}

static void *read_input(const char *path, const pumice_tensor *tensor) {
    void *data = allocate(tensor->bytes);
    FILE *file = fopen(path, "rb");
    if (!file) stop(path, "cannot be opened");
    if (fread(data, 1, tensor->bytes, file) != tensor->bytes || fgetc(file) != EOF)
        stop(path, "does not have exactly the bytes of the input");
    fclose(file);
    return data;
}

static void describe(const char *kind, const pumice_tensor *tensor) {
    printf("%s %s: %s", kind, tensor->name, tensor->dtype);
    for (uint32_t i = 0; i < tensor->rank; i++) printf("%c%llu", i ? 'x' : ' ', (unsigned long long)tensor->shape[i]);
    printf(", %llu bytes\n", (unsigned long long)tensor->bytes);
}

static void print_output(const pumice_tensor *tensor, const void *data) {
    uint64_t count = 1;
    for (uint32_t i = 0; i < tensor->rank; i++) count *= tensor->shape[i];
    printf("%s:", tensor->name);
    for (uint64_t i = 0; i < count; i++) {
        if (!strcmp(tensor->dtype, "float32"))
            printf(" %.9g", ((const float *)data)[i]);
        else if (!strcmp(tensor->dtype, "float64"))
            printf(" %.17g", ((const double *)data)[i]);
        else if (!strcmp(tensor->dtype, "int64"))
            printf(" %lld", (long long)((const int64_t *)data)[i]);
        else if (!strcmp(tensor->dtype, "int32"))
            printf(" %d", (int)((const int32_t *)data)[i]);
        else if (!strcmp(tensor->dtype, "int8"))
            printf(" %d", ((const int8_t *)data)[i]);
        else
            printf(" %d", ((const uint8_t *)data)[i]); /* uint8, bool; bytes of anything else */
    }
    printf("\n");
}

static int run(const model *model, pumice_instance *instance, char **files, uint32_t given) {
    const uint32_t input_count = model->input_count(), output_count = model->output_count();
    if (given != input_count) stop("inputs", "give one file for each input");
    const void **inputs = allocate(sizeof *inputs * (input_count + 1));
    void **outputs = allocate(sizeof *outputs * (output_count + 1));
    for (uint32_t i = 0; i < input_count; i++) inputs[i] = read_input(files[i], model->input(i));
    for (uint32_t i = 0; i < output_count; i++) outputs[i] = allocate(model->output(i)->bytes);
    if (model->run(instance, inputs, outputs) != PUMICE_OK) stop("pumice_run", model->error(instance));
    for (uint32_t i = 0; i < output_count; i++) print_output(model->output(i), outputs[i]);
    for (uint32_t i = 0; i < input_count; i++) free((void *)inputs[i]);
    for (uint32_t i = 0; i < output_count; i++) free(outputs[i]);
    free(inputs);
    free(outputs);
    return 0;
}

static int verify(const model *model, pumice_instance *instance) {
    uint32_t step = 0;
    const pumice_status status = model->verify(instance, &step);
    if (status != PUMICE_OK) {
        fprintf(stderr, "run: %s\n", model->error(instance));
        return status == PUMICE_DIFFERS ? 2 : 1;
    }
    printf("verified\n");
    return 0;
}

int main(int count, char **arguments) {
    uint32_t threads = 1;
    int only_verify = 0, at = 1;
    for (; at < count && arguments[at][0] == '-'; at++) {
        if (!strcmp(arguments[at], "-v"))
            only_verify = 1;
        else if (!strcmp(arguments[at], "-t") && at + 1 < count)
            threads = (uint32_t)strtoul(arguments[++at], NULL, 10);
    }
    if (at >= count) stop("usage", "run [-t THREADS] [-v] ./model.so [INPUT.bin ...]");
    const model model = load(arguments[at++]);
    if (!only_verify && at == count) {
        for (uint32_t i = 0; i < model.input_count(); i++) describe("input", model.input(i));
        for (uint32_t i = 0; i < model.output_count(); i++) describe("output", model.output(i));
        return 0;
    }
    pumice_instance *instance;
    char message[PUMICE_MESSAGE];
    if (model.open(threads, &instance, message, sizeof message) != PUMICE_OK) stop("pumice_open", message);
    const int code = only_verify ? verify(&model, instance) : run(&model, instance, arguments + at, count - at);
    model.close(instance);
    dlclose(model.library);
    return code;
}
