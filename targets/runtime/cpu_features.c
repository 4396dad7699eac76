#include "cpu_features.h"

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)

#include <cpuid.h>

enum { EAX, EBX, ECX, EDX };
enum { ANY = 0, YMM = 0x06, ZMM = 0xe6 }; /* what XCR0 must say that the system saves */

static const struct {
    const char *word;
    uint32_t leaf, subleaf;
    int word_register, bit;
    uint32_t state;
} KNOWN[] = {
    {"pni", 1, 0, ECX, 0, ANY},
    {"ssse3", 1, 0, ECX, 9, ANY},
    {"fma", 1, 0, ECX, 12, YMM},
    {"sse4_1", 1, 0, ECX, 19, ANY},
    {"sse4_2", 1, 0, ECX, 20, ANY},
    {"movbe", 1, 0, ECX, 22, ANY},
    {"popcnt", 1, 0, ECX, 23, ANY},
    {"avx", 1, 0, ECX, 28, YMM},
    {"f16c", 1, 0, ECX, 29, YMM},
    {"bmi1", 7, 0, EBX, 3, ANY},
    {"avx2", 7, 0, EBX, 5, YMM},
    {"bmi2", 7, 0, EBX, 8, ANY},
    {"avx512f", 7, 0, EBX, 16, ZMM},
    {"avx512dq", 7, 0, EBX, 17, ZMM},
    {"avx512ifma", 7, 0, EBX, 21, ZMM},
    {"avx512cd", 7, 0, EBX, 28, ZMM},
    {"avx512bw", 7, 0, EBX, 30, ZMM},
    {"avx512vl", 7, 0, EBX, 31, ZMM},
    {"avx512vbmi", 7, 0, ECX, 1, ZMM},
    {"avx512_vbmi2", 7, 0, ECX, 6, ZMM},
    {"gfni", 7, 0, ECX, 8, ANY},
    {"avx512_vnni", 7, 0, ECX, 11, ZMM},
    {"avx512_bitalg", 7, 0, ECX, 12, ZMM},
    {"avx512_vpopcntdq", 7, 0, ECX, 14, ZMM},
    {"avx512_fp16", 7, 0, EDX, 23, ZMM},
    {"avx_vnni", 7, 1, EAX, 4, YMM},
    {"avx512_bf16", 7, 1, EAX, 5, ZMM},
    {"abm", 0x80000001, 0, ECX, 5, ANY},
    {"sse4a", 0x80000001, 0, ECX, 6, ANY},
    {"xop", 0x80000001, 0, ECX, 11, YMM},
    {"fma4", 0x80000001, 0, ECX, 16, YMM},
    {"tbm", 0x80000001, 0, ECX, 21, ANY},
};

/* XCR0: which registers the system saves when it switches threads. */
static uint32_t saved_state(void) {
    uint32_t a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

bool cpu_has(const char *word) {
    for (unsigned i = 0; i < sizeof KNOWN / sizeof *KNOWN; i++) {
        uint32_t got[4];
        if (strcmp(word, KNOWN[i].word) != 0) continue;
        if ((saved_state() & KNOWN[i].state) != KNOWN[i].state) return false;
        if (!__get_cpuid_count(KNOWN[i].leaf, KNOWN[i].subleaf, &got[0], &got[1], &got[2], &got[3])) return false;
        return got[KNOWN[i].word_register] >> KNOWN[i].bit & 1;
    }
    return false;
}

#elif defined(__aarch64__)

#include <sys/auxv.h>

static const struct {
    const char *word;
    unsigned long entry; /* of the auxiliary vector */
    int bit;
} KNOWN[] = {
    {"asimd", AT_HWCAP, 1},
    {"atomics", AT_HWCAP, 8},
    {"asimdhp", AT_HWCAP, 10},
    {"asimdrdm", AT_HWCAP, 12},
    {"asimddp", AT_HWCAP, 20},
    {"sve", AT_HWCAP, 22},
    {"sve2", AT_HWCAP2, 1},
    {"i8mm", AT_HWCAP2, 13},
    {"bf16", AT_HWCAP2, 14},
};

bool cpu_has(const char *word) {
    for (unsigned i = 0; i < sizeof KNOWN / sizeof *KNOWN; i++)
        if (strcmp(word, KNOWN[i].word) == 0) return getauxval(KNOWN[i].entry) >> KNOWN[i].bit & 1;
    return false;
}

#else
#error "Pumice compiles for x86-64 and AArch64"
#endif
