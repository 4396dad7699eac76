/* What Pumice's kernels call beyond CUDA C++, as NVIDIA's instructions; runtime/emulation/cuda.h has the same for a CPU.
   It becomes the first lines of the generated source. */
#ifdef __CUDACC__
/* Four unsigned bytes times four signed ones, added to an int32: CUDA's __dp4a has no such mixture, PTX does. */
static __device__ __forceinline__ int pumice_dp4a_us(int x, int w, int acc) {
  int sum;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(sum) : "r"(x), "r"(w), "r"(acc));
  return sum;
}
#endif
