/* What this CPU can do, asked of the CPU and the kernel, by the words of /proc/cpuinfo. */
#ifndef PUMICE_CPU_FEATURES_H
#define PUMICE_CPU_FEATURES_H

#include <stdbool.h>

/* Whether the CPU has an instruction set and the system saves its registers; false for a word that is not known. */
bool cpu_has(const char *word);

#endif
