/* What Pumice's kernels call beyond CUDA C++, as NVIDIA's instructions; runtime/emulation/cuda.h has the same for a CPU.
   It becomes the first lines of the generated source. */
#ifdef __CUDACC__
/* Four unsigned bytes times four signed ones, added to an int32: CUDA's __dp4a has no such mixture, PTX does. */
static __device__ __forceinline__ int pumice_dp4a_us(int x, int w, int acc) {
  int sum;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(sum) : "r"(x), "r"(w), "r"(acc));
  return sum;
}

/* A warp multiplies 16 rows of 32 signed weights by 32 unsigned inputs of 8 positions. */
static __device__ __forceinline__ void pumice_mma(int *acc, const int *a, const int *b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  __trap(); /* such kernels are not launched here */
#else
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+r"(acc[0]), "+r"(acc[1]), "+r"(acc[2]), "+r"(acc[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

/* The same for 64 inputs, of which two of every four have a weight: a holds these, metadata their places. */
static __device__ __forceinline__ void pumice_mma_sp(int *acc, const int *a, const int *b, int metadata) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  __trap();
#else
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1205
#define PUMICE_MMA_SP "mma.sp::ordered_metadata"
#else
#define PUMICE_MMA_SP "mma.sp"
#endif
  asm volatile(PUMICE_MMA_SP ".sync.aligned.m16n8k64.row.col.s32.s8.u8.s32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;"
               : "+r"(acc[0]), "+r"(acc[1]), "+r"(acc[2]), "+r"(acc[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
                 "r"(metadata));
#endif
}
#endif
