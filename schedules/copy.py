"""The kernel that copies bytes: for outputs that were an input, a weight, or another output."""

from __future__ import annotations

from tvm import tirx

from pumice.schedules import emit


def copy(size: int, name: str = "copy") -> tirx.PrimFunc:
    """The PrimFunc of x, y: uint8 ``[size]``. LLVM makes a call of memcpy of it."""

    def body() -> None:
        x, y = (emit.argument(name, (size,), "uint8") for name in ("x", "y"))
        emit.for_strips(size, 1, lambda i, n: emit.store(y, i, emit.load(x, i, n), n))

    return emit.kernel(name, body)
