/* Runs every step of a library of kernels on one block of memory: runner LIBRARY MEMORY SCRATCH STEPS TASKS
 * MEMORY is a file; what the kernels made of it is written back to it. */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef int32_t entry(void **buffers, int32_t first, int32_t last, int32_t task, int32_t tasks);

static void *block(size_t size)
{
    return aligned_alloc(64, (size + 64) / 64 * 64);
}

int main(int count, char **arguments)
{
    if (count != 6)
        return 2;
    void *library = dlopen(arguments[1], RTLD_NOW);
    entry *steps = library ? (entry *)(uintptr_t)dlsym(library, "pumice_steps") : NULL;
    FILE *file = fopen(arguments[2], "r+b");
    if (!steps || !file || fseek(file, 0, SEEK_END)) {
        fprintf(stderr, "%s\n", steps ? "no memory file" : dlerror());
        return 3;
    }
    size_t size = (size_t)ftell(file);
    void *memory = block(size), *scratch = block(strtoul(arguments[3], NULL, 10));
    rewind(file);
    if (!memory || !scratch || fread(memory, 1, size, file) != size)
        return 4;
    void *buffers[] = {memory, NULL, scratch};
    int32_t last = atoi(arguments[4]), tasks = atoi(arguments[5]);
    for (int32_t step = 0; step < last; step++)
        for (int32_t task = 0; task < tasks; task++)
            if (steps(buffers, step, step + 1, task, tasks))
                return 5;
    rewind(file);
    return fwrite(memory, 1, size, file) == size && !fclose(file) ? 0 : 6;
}
