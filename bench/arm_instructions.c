/* arm_instructions WEIGHTS FIRST LAST: steps of a compiled layer once, on one thread. What the activations are does not
 * change which instructions run. The sizes of the buffers come from the command line of the compiler. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int32_t pumice_steps(void **buffers, int32_t first, int32_t last, int32_t task, int32_t tasks);

static _Alignas(64) unsigned char weights[WEIGHTS + 1], workspace[WORKSPACE + 1], scratch[SCRATCH + 1];
static _Alignas(64) unsigned char input[INPUT], output[OUTPUT];

int main(int argc, char **argv) {
    FILE *file = argc == 4 ? fopen(argv[1], "rb") : NULL;
    if (!file || fread(weights, 1, WEIGHTS, file) != WEIGHTS) return 1;
    void *buffers[] = {weights, workspace, scratch, input, output};
    return pumice_steps(buffers, atoi(argv[2]), atoi(argv[3]), 0, 1);
}
