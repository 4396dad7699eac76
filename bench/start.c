/* What a compiled model costs a program: `start model.so THREADS [SAMPLE]` opens it, runs it once and prints as JSON
 *
 *     ms        from before dlopen until the first result is there
 *     resident  the most bytes of memory that the process had, and of these
 *     own       bytes in no file, which no other process shares: what one more process costs
 *     status    of pumice_verify; the run before it has to succeed
 *
 * SAMPLE is a file of all inputs, one after the other; without it they are zeros. Standard input is the folder /proc, so
 * that memory can be asked for where that is not mounted: `start model.so 1 < /proc`. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "pumice.h"

enum { MOST = 16 }; /* inputs or outputs */

static double milliseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return 1e3 * (double)now.tv_sec + 1e-6 * (double)now.tv_nsec;
}

/* What /proc/self/status says of `key`, in bytes; 0 where it cannot be read. */
static long long memory(const char *key) {
    long long kilobytes = 0;
    char line[256];
    const int entry = openat(STDIN_FILENO, "self/status", O_RDONLY);
    FILE *file = entry < 0 ? NULL : fdopen(entry, "r");
    while (file && fgets(line, sizeof line, file))
        if (!strncmp(line, key, strlen(key))) kilobytes = atoll(line + strlen(key));
    if (file) fclose(file);
    return 1024 * kilobytes;
}

int main(int count, char **arguments) {
    FILE *sample = count == 4 ? fopen(arguments[3], "rb") : NULL;
    if (count < 3 || (count == 4 && !sample)) return 100;

    const double begin = milliseconds();
    void *library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
    if (!library) return fprintf(stderr, "%s\n", dlerror()), 101;
    const pumice_tensor *(*input)(uint32_t), *(*output)(uint32_t);
    pumice_status (*open_model)(uint32_t, pumice_instance **, char *, uint64_t);
    pumice_status (*run)(pumice_instance *, const void *const *, void *const *);
    pumice_status (*verify)(pumice_instance *, uint32_t *);
    *(void **)&input = dlsym(library, "pumice_input");
    *(void **)&output = dlsym(library, "pumice_output");
    *(void **)&open_model = dlsym(library, "pumice_open");
    *(void **)&run = dlsym(library, "pumice_run");
    *(void **)&verify = dlsym(library, "pumice_verify");

    void *inputs[MOST], *outputs[MOST];
    for (uint32_t i = 0; i < MOST && input(i); i++) {
        inputs[i] = calloc(1, input(i)->bytes);
        if (!inputs[i] || (sample && fread(inputs[i], input(i)->bytes, 1, sample) != 1)) return 102;
    }
    for (uint32_t i = 0; i < MOST && output(i); i++)
        if (!(outputs[i] = calloc(1, output(i)->bytes))) return 102;
    pumice_instance *instance;
    char message[PUMICE_MESSAGE];
    pumice_status status = open_model((uint32_t)atoi(arguments[2]), &instance, message, sizeof message);
    if (status != PUMICE_OK) return fprintf(stderr, "%s\n", message), status;
    status = run(instance, (const void *const *)inputs, outputs);
    const double end = milliseconds();
    if (status != PUMICE_OK) return status;

    /* Not getrusage: that counts what the process was before exec too. */
    const long long resident = memory("VmHWM:"), own = memory("RssAnon:");
    printf("{\"ms\": %.3f, \"resident\": %lld, \"own\": %lld, \"status\": %d}\n", end - begin, resident, own,
           verify(instance, NULL));
    return 0;
}
