"""One kernel as a library of its own, run on arrays and timed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import tirx

from pumice.targets.executor import link_model
from pumice.targets.plan import FIRST_INPUT, WEIGHTS, Plan, Step, View, align, aligned
from pumice.targets.target import Target


class KernelModel:
    """``arrays`` are the kernel's arguments, the output last.

    The first is the input and aligned, as a layer finds it inside a network; the others are constants.
    """

    def __init__(self, function: tirx.PrimFunc, target: Target, arrays: Sequence[np.ndarray], threads: int) -> None:
        data, *constants, result = arrays
        places = np.cumsum([0, *(align(array.nbytes) for array in constants)]).tolist()
        weights = aligned((places[-1],), "uint8")
        for place, array in zip(places, constants, strict=False):
            weights[place : place + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        views = [View(FIRST_INPUT), *(View(WEIGHTS, place) for place in places[:-1]), View(FIRST_INPUT + 1)]
        specs = [(array.shape, str(array.dtype)) for array in (data, result)]
        steps = (Step("kernel", tuple(views), outputs=(result.nbytes,)),)
        self._model = link_model(
            Plan({"kernel": function}, steps, weights, 0, (specs[0],), (specs[1],)), target, threads
        )
        self._inputs, self._outputs = ([aligned(*spec)] for spec in specs)
        self._inputs[0][...] = data

    def seconds(self) -> float:
        """The time of one run, without that of a call that runs nothing."""
        return max(self._time(1) - self._time(0), 1e-9)

    def __enter__(self) -> KernelModel:
        return self

    def __exit__(self, *_: Any) -> None:
        self._model.close()

    def _time(self, last: int) -> float:
        start = time.perf_counter()
        self._model.run(self._inputs, self._outputs, 0, last)
        return time.perf_counter() - start
