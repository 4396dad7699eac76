/* The part of CUDA's driver that a library calls, declared here so that it builds without NVIDIA's headers, and what
 * the compiler says of a model's kernels. The driver is opened at run time: see cuda.c. */
#ifndef PUMICE_CUDA_DRIVER_H
#define PUMICE_CUDA_DRIVER_H

#include <stddef.h>
#include <stdint.h>

/* Pointers to what is the driver's are void *; its enumerations are ints, and 0 is success. */
typedef unsigned long long cuda_address;

enum { CUDA_MAJOR = 75, CUDA_MINOR = 76 };          /* attributes of a device: its compute capability */
enum { CUDA_CAPTURE_RELAXED = 2, CUDA_NON_BLOCKING = 1 };

/* Every function by its exported name, which has the version of its arguments behind it. */
#define CUDA_DRIVER(function)                                                                                      \
    function(cuInit, (unsigned flags))                                                                             \
    function(cuGetErrorString, (int error, const char **text))                                                     \
    function(cuDeviceGetCount, (int *count))                                                                       \
    function(cuDeviceGet, (int *device, int number))                                                               \
    function(cuDeviceGetName, (char *name, int size, int device))                                                  \
    function(cuDeviceGetAttribute, (int *value, int attribute, int device))                                        \
    function(cuDevicePrimaryCtxRetain, (void **context, int device))                                               \
    function(cuDevicePrimaryCtxRelease_v2, (int device))                                                           \
    function(cuCtxPushCurrent_v2, (void *context))                                                                 \
    function(cuCtxPopCurrent_v2, (void **context))                                                                 \
    function(cuModuleLoadData, (void **module, const void *image))                                                 \
    function(cuModuleUnload, (void *module))                                                                       \
    function(cuModuleGetFunction, (void **kernel, void *module, const char *name))                                 \
    function(cuMemAlloc_v2, (cuda_address *address, size_t bytes))                                                 \
    function(cuMemFree_v2, (cuda_address address))                                                                 \
    function(cuMemAllocHost_v2, (void **address, size_t bytes))                                                    \
    function(cuMemFreeHost, (void *address))                                                                       \
    function(cuMemcpyHtoD_v2, (cuda_address to, const void *from, size_t bytes))                                   \
    function(cuMemcpyDtoH_v2, (void *to, cuda_address from, size_t bytes))                                         \
    function(cuMemcpyHtoDAsync_v2, (cuda_address to, const void *from, size_t bytes, void *stream))                \
    function(cuMemcpyDtoHAsync_v2, (void *to, cuda_address from, size_t bytes, void *stream))                      \
    function(cuMemsetD8_v2, (cuda_address address, unsigned char value, size_t bytes))                             \
    function(cuStreamCreate, (void **stream, unsigned flags))                                                      \
    function(cuStreamDestroy_v2, (void *stream))                                                                   \
    function(cuStreamSynchronize, (void *stream))                                                                  \
    function(cuLaunchKernel, (void *kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,   \
                              unsigned block_y, unsigned block_z, unsigned shared_bytes, void *stream,             \
                              void **arguments, void **extra))

/* Graphs: without these, which are CUDA 11.4's, the steps are launched one by one. */
#define CUDA_GRAPHS(function)                                                                                      \
    function(cuStreamBeginCapture_v2, (void *stream, int mode))                                                    \
    function(cuStreamEndCapture, (void *stream, void **graph))                                                     \
    function(cuGraphInstantiateWithFlags, (void **executable, void *graph, unsigned long long flags))              \
    function(cuGraphLaunch, (void *executable, void *stream))                                                      \
    function(cuGraphExecDestroy, (void *executable))                                                               \
    function(cuGraphDestroy, (void *graph))

#define CUDA_POINTER(name, arguments) int(*name) arguments;
typedef struct {
    CUDA_DRIVER(CUDA_POINTER)
    CUDA_GRAPHS(CUDA_POINTER)
} cuda_driver;
#undef CUDA_POINTER

/* What cuda_model.c holds, which the compiler writes, and sections of data. */
typedef struct {
    uint32_t architecture;   /* 10 times the major version of the compute capability and the minor one */
    uint64_t offset, bytes;  /* of its code in pumice_cubins */
} cuda_code;

typedef struct {
    uint32_t buffer; /* as in model.h */
    uint64_t offset;
} cuda_argument;

typedef struct {
    const char *kernel;
    uint32_t step;
    uint32_t grid[3], block[3], shared_bytes;
    uint32_t first_argument, end_of_arguments; /* of the model's arguments */
} cuda_launch;

typedef struct {
    uint64_t weights; /* bytes */
    uint32_t code_count, launch_count, most_arguments; /* of a launch */
    const cuda_code *code;
    const cuda_launch *launches; /* step after step */
    const cuda_argument *arguments;
} cuda_tables;

extern const cuda_tables pumice_cuda;
extern const uint8_t pumice_cubins[];

#endif
