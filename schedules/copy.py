"""The kernel that copies bytes: for outputs that were an input, a weight, or another output."""

from __future__ import annotations

from tvm import tirx

from pumice.schedules import emit

_LANES = 64


def copy(size: int, name: str = "copy") -> tirx.PrimFunc:
    """The PrimFunc of x, y: uint8 ``[size]``."""

    def body() -> None:
        x, y = (emit.argument(name, (size,), "uint8") for name in ("x", "y"))
        emit.for_strips(size, _LANES, lambda i, n: emit.store(y, i, emit.load(x, i, n), n))

    return emit.kernel(name, body)
