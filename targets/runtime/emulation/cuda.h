/* CUDA C++ on a CPU, to check the numbers of generated kernels where there is no GPU. Generated sources include
   <cuda.h>; with this folder first on the include path a C++17 compiler for Linux finds this file instead.

   Each thread of a block is a fiber: it runs until it waits at a barrier, which opens when all have come. Blocks and
   threads run in order or in reverse order; a result that depends on which misses a barrier. Shared memory is full of
   garbage when a block starts. A launch gives 0, or what went wrong: OUTSIDE (it touched memory that is not its own,
   or was not aligned: arguments must lie between pages without access) or DIVERGED (a thread ended, or waits
   elsewhere, while others wait at a barrier). One launch at a time. */
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("pumice_shared")))
#define alignas(bytes) __attribute__((aligned(bytes)))

extern "C" char __start_pumice_shared[] __attribute__((weak)), __stop_pumice_shared[] __attribute__((weak));

struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace pumice {

constexpr unsigned WARP = 32;
constexpr size_t STACK = 64 * 1024;
enum Status { FINE, OUTSIDE, DIVERGED };

/* Opens when `size` have come; `round` tells those who wait. */
struct Barrier {
  unsigned size = 0, come = 0, round = 0;
};

struct Fiber {
  ucontext_t start;
  jmp_buf place;
  std::unique_ptr<char[]> stack;
  uint3 index;
  unsigned lane, warp;
  bool begun, ended;
};

struct Warp {
  Barrier barrier;
  uint32_t registers[WARP][16]; /* what its lanes show each other */
};

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Barrier block_barrier;
inline Fiber *current;
inline uint3 block_index, block_size, grid_size;
inline void (*body)(void *);
inline void *body_arguments;
inline jmp_buf scheduler;
inline sigjmp_buf fault;
inline bool moved; /* whether a fiber got any further in this turn */

inline void yield() {
  if (!_setjmp(current->place)) _longjmp(scheduler, 1);
}

inline void wait(Barrier &barrier) {
  const unsigned round = barrier.round;
  moved = true;
  if (++barrier.come == barrier.size) {
    barrier.come = 0;
    ++barrier.round;
    return;
  }
  while (barrier.round == round) yield();
  moved = true;
}

inline void begin() {
  body(body_arguments);
  current->ended = true;
  moved = true;
  _longjmp(scheduler, 1);
}

inline void resume(Fiber &fiber) {
  current = &fiber;
  if (_setjmp(scheduler)) return;
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  setcontext(&fiber.start);
}

inline void prepare(unsigned threads) {
  if (fibers.size() != threads) fibers = std::vector<Fiber>(threads);
  warps.assign((threads + WARP - 1) / WARP, Warp());
  block_barrier = Barrier{threads, 0, 0};
  for (unsigned i = 0; i < threads; ++i) {
    Fiber &fiber = fibers[i];
    fiber.index = {i % block_size.x, i / block_size.x % block_size.y, i / (block_size.x * block_size.y)};
    fiber.lane = i % WARP;
    fiber.warp = i / WARP;
    fiber.begun = fiber.ended = false;
    ++warps[fiber.warp].barrier.size;
    if (!fiber.stack) fiber.stack.reset(new char[STACK]);
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = STACK;
    makecontext(&fiber.start, begin, 0);
  }
}

/* One block whose threads wait for each other. */
inline Status run_together(bool reversed) {
  const unsigned threads = block_size.x * block_size.y * block_size.z;
  prepare(threads);
  for (unsigned ended = 0; ended < threads;) {
    moved = false;
    ended = 0;
    for (unsigned i = 0; i < threads; ++i) {
      Fiber &fiber = fibers[reversed ? threads - 1 - i : i];
      if (!fiber.ended) resume(fiber);
      ended += fiber.ended;
    }
    if (!moved) return DIVERGED;
  }
  return FINE;
}

/* One block whose threads do not. */
inline Status run_apart(bool reversed) {
  const unsigned threads = block_size.x * block_size.y * block_size.z;
  if (fibers.empty()) fibers = std::vector<Fiber>(1);
  current = &fibers[0];
  for (unsigned n = 0; n < threads; ++n) {
    const unsigned i = reversed ? threads - 1 - n : n;
    current->index = {i % block_size.x, i / block_size.x % block_size.y, i / (block_size.x * block_size.y)};
    body(body_arguments);
  }
  return FINE;
}

inline Status run_grid(bool together, bool reversed) {
  const unsigned blocks = grid_size.x * grid_size.y * grid_size.z;
  for (unsigned n = 0; n < blocks; ++n) {
    const unsigned i = reversed ? blocks - 1 - n : n;
    block_index = {i % grid_size.x, i / grid_size.x % grid_size.y, i / (grid_size.x * grid_size.y)};
    if (__start_pumice_shared) memset(__start_pumice_shared, 0xA7, __stop_pumice_shared - __start_pumice_shared);
    const Status status = together ? run_together(reversed) : run_apart(reversed);
    if (status != FINE) return status;
  }
  return FINE;
}

inline void on_fault(int) { siglongjmp(fault, 1); }

template <typename... P, size_t... I>
void call(void (*kernel)(P...), void **arguments, std::index_sequence<I...>) {
  kernel(static_cast<P>(arguments[I])...);
}

/* A launch of `kernel` on pointers; `together`: whether its threads wait for each other anywhere. */
template <auto kernel, typename... P>
int launch(void (*)(P...), void **arguments, const unsigned *grid, const unsigned *block, bool together,
           bool reversed) {
  grid_size = {grid[0], grid[1], grid[2]};
  block_size = {block[0], block[1], block[2]};
  body_arguments = arguments;
  body = [](void *given) {
    call(static_cast<void (*)(P...)>(kernel), static_cast<void **>(given), std::index_sequence_for<P...>());
  };
  struct sigaction action = {}, before[2];
  action.sa_handler = on_fault;
  sigaction(SIGSEGV, &action, &before[0]);
  sigaction(SIGBUS, &action, &before[1]);
  const int status = sigsetjmp(fault, 1) ? OUTSIDE : run_grid(together, reversed);
  sigaction(SIGSEGV, &before[0], nullptr);
  sigaction(SIGBUS, &before[1], nullptr);
  return status;
}

}  // namespace pumice

/* The function `name`_launch, called with an array of pointers. */
#define PUMICE_LAUNCH(name, together)                                                                          \
  extern "C" int name##_launch(void **arguments, const unsigned *grid, const unsigned *block, int reversed) {   \
    return pumice::launch<name>(name, arguments, grid, block, together, reversed != 0);                       \
  }

#define threadIdx (pumice::current->index)
#define blockIdx (pumice::block_index)
#define blockDim (pumice::block_size)
#define gridDim (pumice::grid_size)

inline void __syncthreads() { pumice::wait(pumice::block_barrier); }
inline void __syncwarp(unsigned = ~0u) { pumice::wait(pumice::warps[pumice::current->warp].barrier); }

/* The value of `from`, which may be any function of the own lane. */
template <typename T>
T pumice_shuffle(T value, unsigned from) {
  static_assert(sizeof(T) == 4, "a register has 32 bits");
  pumice::Warp &warp = pumice::warps[pumice::current->warp];
  memcpy(warp.registers[pumice::current->lane], &value, 4);
  pumice::wait(warp.barrier);
  memcpy(&value, warp.registers[from % pumice::WARP], 4);
  pumice::wait(warp.barrier);
  return value;
}

template <typename T>
T __shfl_sync(unsigned, T value, int lane, int width = pumice::WARP) {
  return pumice_shuffle(value, (pumice::current->lane & ~(width - 1u)) | (lane & (width - 1u)));
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask, int = pumice::WARP) {
  return pumice_shuffle(value, pumice::current->lane ^ mask);
}

/* Arithmetic; the source must be compiled with -ffp-contract=off. */
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline int __float2int_rn(float x) { /* saturates, and NaN gives 0 */
  if (std::isnan(x)) return 0;
  return x >= 0x1p31f ? INT32_MAX : x <= -0x1p31f ? INT32_MIN : static_cast<int>(std::lrint(x));
}
inline int max(int a, int b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline float max(float a, float b) { return std::fmax(a, b); }
inline float min(float a, float b) { return std::fmin(a, b); }

/* Four unsigned bytes times four signed ones. */
inline int pumice_dp4a_us(int x, int w, int acc) {
  for (int shift = 0; shift < 32; shift += 8)
    acc += static_cast<uint8_t>(x >> shift) * static_cast<int8_t>(w >> shift);
  return acc;
}

/* Tensor cores, by the layouts of the PTX ISA. Each lane shows its registers, and finds for each of its four results the
   weights of the row and the inputs of the position. */
inline void pumice_show(pumice::Warp &warp, const int *a, const int *b, int words, int metadata) {
  uint32_t *shown = warp.registers[pumice::current->lane];
  memcpy(shown, a, 16);
  memcpy(shown + 4, b, 4 * words);
  memcpy(shown + 8, &metadata, 4);
  pumice::wait(warp.barrier);
}

/* The product of the `kept`-th weight of `row` with input `k` at position `column`. */
inline int pumice_product(const pumice::Warp &warp, unsigned row, unsigned kept, unsigned k, unsigned column) {
  const uint32_t w = warp.registers[row % 8 * 4 + kept % 16 / 4][kept / 16 * 2 + row / 8] >> kept % 4 * 8;
  const uint32_t x = warp.registers[column * 4 + k % 16 / 4][4 + k / 16] >> k % 4 * 8;
  return static_cast<int8_t>(w) * static_cast<uint8_t>(x);
}

/* m16n8k32 */
inline void pumice_mma(int *acc, const int *a, const int *b) {
  pumice::Warp &warp = pumice::warps[pumice::current->warp];
  const unsigned lane = pumice::current->lane;
  pumice_show(warp, a, b, 2, 0);
  for (unsigned i = 0; i < 4; ++i)
    for (unsigned k = 0; k < 32; ++k)
      acc[i] += pumice_product(warp, lane / 4 + i / 2 * 8, k, k, lane % 4 * 2 + i % 2);
  pumice::wait(warp.barrier);
}

/* Sparse m16n8k64 */
inline void pumice_mma_sp(int *acc, const int *a, const int *b, int metadata) {
  pumice::Warp &warp = pumice::warps[pumice::current->warp];
  const unsigned lane = pumice::current->lane;
  pumice_show(warp, a, b, 4, metadata);
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + i / 2 * 8;
    for (unsigned kept = 0; kept < 32; ++kept) {
      const unsigned four = kept / 2;
      const uint32_t places = warp.registers[row % 8 * 4 + row / 8 + four / 8 * 2][8] >> four % 8 * 4;
      const unsigned k = four * 4 + (places >> kept % 2 * 2 & 3);
      acc[i] += pumice_product(warp, row, kept, k, lane % 4 * 2 + i % 2);
    }
  }
  pumice::wait(warp.barrier);
}
