"""The kernel of one layer alone, as the compiler makes it, and its time: Pumice's, and the other engines' own.

A layer inside a network finds its input where the layer before left it. A model of one layer has conversions of the
layout around it, so what is compared is the time of the layer itself. Pumice's kernel is taken out of the lowered
model. For the other engines it is the time of a call without what the call of next to no layer takes. ONNX Runtime
converts nothing if its input and output are channels-last; of OpenVINO's time counts the layer's share, by its
profiler.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import tvm
from tvm import relax

from bench.kernel_model import KernelModel
from bench.layer_shapes import LayerShape
from pumice.bench import Timing, summarize, take_turns
from pumice.frontend import read_model
from pumice.module import layers_of, weights_of
from pumice.passes.choose_kernel import Chooser
from pumice.passes.pipeline import LowerOptions, lower
from pumice.peers import OnnxRuntime, OpenVino
from pumice.prepare import prepare
from pumice.recipe import Recipe
from pumice.schedules.tiling import FORMS
from pumice.stages import Stages
from pumice.targets.target import Target

NO_LAYER = LayerShape(16, 16, 1)


class Kernel(Protocol):
    """Something to time that knows its own time."""

    def run(self) -> None:
        """One run."""

    def milliseconds(self) -> list[float]:
        """The time of every run so far; asked once, at the end."""


class PumiceKernel:
    """Pumice's dense kernel, or the sparse one that it would choose; ``nbytes`` is all that it reads and writes."""

    def __init__(self, shape: LayerShape, weight: np.ndarray, is_dense: bool, target: str, threads: int) -> None:
        model = shape.model(weight)
        device = Target.parse(target)
        mod = prepare(read_model(model, None), Recipe(), None, None, Stages(None))
        forms = [form for form in FORMS if form.is_dense == is_dense]
        lowered = lower(mod, device, LowerOptions(threads, Chooser(forms)))
        (self.description,) = (layer.kernel for layer in layers_of(lowered).values())
        name, arrays = _layer_call(lowered)
        self._kernel = KernelModel(lowered[name], device, arrays, threads)
        self._times: list[float] = []
        self.nbytes = sum(array.nbytes for array in arrays)

    def run(self) -> None:
        """One run."""
        self._times.append(self._kernel.seconds() * 1e3)

    def milliseconds(self) -> list[float]:
        """The time of every run so far."""
        return self._times


class PeerKernel:
    """A one-layer model on another engine: its calls, without what the call of ``NO_LAYER`` takes in the same turns."""

    def __init__(self, peer: str, shape: LayerShape, weight: np.ndarray, threads: int) -> None:
        self._session = self._open(peer, shape, weight, threads)
        empty = self._open(peer, NO_LAYER, NO_LAYER.weight(), threads)
        draw = np.random.default_rng(0)
        is_onnxruntime = isinstance(self._session, OnnxRuntime)
        self._calls = [
            (session, {"x": draw.integers(0, 256, each.plane(each.inputs, is_onnxruntime), dtype=np.uint8)})
            for session, each in ((self._session, shape), (empty, NO_LAYER))
        ]
        self._times: list[list[float]] = [[], []]
        self._session.infer(self._calls[0][1])
        self._first = self._spent()
        self.title = self._session.title

    @staticmethod
    def _open(peer: str, shape: LayerShape, weight: np.ndarray, threads: int) -> OnnxRuntime | OpenVino:
        if peer == "onnxruntime":
            return OnnxRuntime(shape.model(weight, channels_last=True).SerializeToString(), threads)
        return OpenVino(shape.model(weight).SerializeToString(), threads, profile=True)

    def run(self) -> None:
        """One run."""
        for (session, feed), times in zip(self._calls, self._times, strict=True):
            before = time.perf_counter()
            session.infer(feed)
            times.append((time.perf_counter() - before) * 1e3)

    def milliseconds(self) -> list[float]:
        """The time of every run so far."""
        calls, overhead = self._times
        nothing, share = float(np.median(overhead)), self._share()
        return [(value - nothing) * share for value in calls]

    def _spent(self) -> dict[str, float]:
        """By type of operator, in one inference: the mean of all so far."""
        return self._session.operator_means() if isinstance(self._session, OpenVino) else {}

    def _share(self) -> float:
        """What part of a call is not conversions. The first inference is slow: it is taken out of the means."""
        runs = len(self._times[0]) + 1
        totals = {name: mean * runs - self._first.get(name, 0.0) for name, mean in self._spent().items()}
        everything = sum(totals.values())
        return 1.0 - totals.get("Reorder", 0.0) / everything if everything else 1.0


def time_kernels(kernels: Mapping[str, Kernel], seconds: float) -> list[Timing]:
    """Run the kernels in turns for about ``seconds`` in all; medians and spread of their own times."""
    turns = take_turns({name: kernel.run for name, kernel in kernels.items()}, seconds)
    rounds: dict[str, list[list[float]]] = {}
    for name, kernel in kernels.items():
        times = iter(kernel.milliseconds())
        taken = [
            [next(times) for _ in range(turn.uncounted + len(turn.milliseconds))][turn.uncounted :]
            for turn in turns[name]
        ]
        rounds[name] = [counted for counted in taken if counted]
    return summarize(rounds)


def _layer_call(lowered: tvm.IRModule) -> tuple[str, list[np.ndarray]]:
    """The name of the layer's kernel, and arrays for its arguments, the output last."""
    weights = weights_of(lowered)
    draw = np.random.default_rng(0)

    def array(value: relax.Expr) -> np.ndarray:
        if isinstance(value, tvm.ir.GenericConst):
            return np.asarray(value.value.numpy())
        if isinstance(value, relax.Var) and value.name in weights:
            return weights[value.name]
        return draw.integers(0, 256, [int(size) for size in value.ty.shape]).astype(str(value.ty.dtype))

    for block in lowered["main"].body.blocks:
        for binding in block.bindings:
            call = binding.value
            if isinstance(call, relax.Call) and call.op == tvm.ir.Op.get("relax.call_tir"):
                name = str(call.args[0].name_hint)
                if name.startswith("layer_"):
                    return name, [array(value) for value in (*call.args[1], binding.var)]
    raise ValueError("the lowered model has no layer kernel")
