/* What a model costs in memory: `resident model.so THREADS` runs it once on zeros and prints the most kilobytes of
 * memory that the process had. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pumice.h"

int main(int count, char **arguments) {
    void *library = count == 3 ? dlopen(arguments[1], RTLD_NOW) : NULL;
    if (!library) return 1;
    const pumice_tensor *(*input)(uint32_t), *(*output)(uint32_t);
    pumice_status (*open)(uint32_t, pumice_instance **, char *, uint64_t);
    pumice_status (*run)(pumice_instance *, const void *const *, void *const *);
    *(void **)&input = dlsym(library, "pumice_input");
    *(void **)&output = dlsym(library, "pumice_output");
    *(void **)&open = dlsym(library, "pumice_open");
    *(void **)&run = dlsym(library, "pumice_run");

    const void *inputs[16];
    void *outputs[16];
    for (uint32_t i = 0; input(i); i++) inputs[i] = calloc(1, input(i)->bytes);
    for (uint32_t i = 0; output(i); i++) outputs[i] = calloc(1, output(i)->bytes);
    pumice_instance *instance;
    if (open((uint32_t)atoi(arguments[2]), &instance, NULL, 0) != PUMICE_OK) return 2;
    if (run(instance, inputs, outputs) != PUMICE_OK) return 3;

    /* Not getrusage: that counts what the process was before exec too. */
    char line[256];
    FILE *status = fopen("/proc/self/status", "r");
    while (status && fgets(line, sizeof line, status))
        if (strncmp(line, "VmHWM:", 6) == 0) printf("%d\n", atoi(line + 6));
    return 0;
}
