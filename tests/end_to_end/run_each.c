/* run_each INPUTS OUTPUTS THREADS: a file of samples, one after the other, to a file of results.
 *
 * A sample is all inputs of the model, a result all its outputs. The exit code is the status of the call that failed. */
#include <stdio.h>
#include <stdlib.h>

#include "pumice.h"

enum { MOST = 8 };

int main(int argc, char **argv) {
    uint32_t takes = pumice_input_count(), gives = pumice_output_count();
    void *inputs[MOST], *outputs[MOST];
    if (argc != 4 || takes > MOST || gives > MOST) return 100;
    FILE *from = fopen(argv[1], "rb"), *to = fopen(argv[2], "wb");
    if (!from || !to) return 101;
    for (uint32_t i = 0; i < takes; i++)
        if (!(inputs[i] = malloc(pumice_input(i)->bytes))) return 102;
    for (uint32_t i = 0; i < gives; i++)
        if (!(outputs[i] = malloc(pumice_output(i)->bytes))) return 102;
    pumice_instance *instance;
    char message[PUMICE_MESSAGE];
    pumice_status status = pumice_open((uint32_t)atoi(argv[3]), &instance, message, sizeof message);
    if (status != PUMICE_OK) {
        fprintf(stderr, "%s\n", message);
        return (int)status;
    }
    for (;;) {
        for (uint32_t i = 0; i < takes; i++)
            if (fread(inputs[i], pumice_input(i)->bytes, 1, from) != 1) {
                pumice_close(instance);
                return fclose(to);
            }
        status = pumice_run(instance, (const void *const *)inputs, outputs);
        if (status != PUMICE_OK) {
            fprintf(stderr, "%s\n", pumice_error(instance));
            return (int)status;
        }
        for (uint32_t i = 0; i < gives; i++)
            if (fwrite(outputs[i], pumice_output(i)->bytes, 1, to) != 1) return 103;
    }
}
