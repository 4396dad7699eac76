"""Kernels for NVIDIA GPUs: PrimFuncs with thread bindings, on the packed form and the blocks of the CPU's kernels."""
