"""The weights that an advisor may change, and what may be done to each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.ir import IRModule

from pumice.advisor.removals import REMOVALS, ladders
from pumice.errors import UsageError
from pumice.module import layers_of, weights_of
from pumice.passes.layer_kernel import LayerWork
from pumice.passes.layers import Layer, find_layers
from pumice.passes.prune_spec import METHODS, PruneSpec, SparseGPT
from pumice.passes.sparsity import is_depthwise
from pumice.passes.statistics import Moments, input_moments
from pumice.patterns import Pattern
from pumice.targets.target import Target
from pumice.tune import layer_works

_REFITS = 20
TECHNIQUES = ("magnitude", "wanda", "sparsegpt")
SLOW = ("obc",)  # tried only where they are named
PATTERNS = ("1x4", "2x4", "4x4", "unstructured")
LEVELS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Space:
    """What is tried: each technique with each pattern, at each level that the pattern leaves free.

    ``removals`` are filters and heads that are taken out before, as specifications, while that is worth it.
    """

    techniques: tuple[str, ...] = TECHNIQUES
    patterns: tuple[str, ...] = PATTERNS
    levels: tuple[float, ...] = LEVELS
    removals: tuple[str, ...] = REMOVALS

    def __post_init__(self) -> None:
        """Refuse what cannot be tried."""
        for technique in self.techniques:
            if technique not in (*TECHNIQUES, *SLOW):
                known = ", ".join((*TECHNIQUES, *SLOW))
                raise UsageError(f"there is no technique {technique!r} to try; there are {known}")
        self.parsed  # noqa: B018
        ladders(self.removals)

    @classmethod
    def of(cls, target: Target, **given: Any) -> Space:
        """All that the target's kernels may profit from, but for what is ``given``: fields by name."""
        patterns = (*PATTERNS, "2:4") if target.runs_on_gpu else PATTERNS
        return cls(**{"patterns": patterns, **given})

    def specs(self, patterns: tuple[Pattern, ...]) -> tuple[PruneSpec, ...]:
        """Every specification with one of ``patterns``."""
        found = []
        for technique in self.techniques:
            for pattern in patterns:
                levels = self.levels if pattern.amount is None else (pattern.amount,)
                found += [spec_of(technique, pattern, level) for level in levels]
        return tuple(found)

    @property
    def parsed(self) -> tuple[Pattern, ...]:
        """The patterns. Raises UsageError for one that is none."""
        return tuple(Pattern.parse(text) for text in self.patterns)


def spec_of(technique: str, pattern: Pattern, amount: float) -> PruneSpec:
    """``magnitude:1x4:0.9``; sparsegpt with refits, as an advisor has the time for the best."""
    if technique == SparseGPT.method:
        return SparseGPT(pattern, amount, refits=_REFITS)
    return METHODS[technique](pattern=pattern, amount=amount)  # type: ignore[call-arg]


@dataclass(frozen=True, eq=False)
class Subject:
    """One weight and all that its options depend on, without the module that it came from.

    name: of its (first) layer; layers: all that read it; weight: its name in the module
    rows: float32 ``[N, taps, C]``; groups: of the convolution
    specs: what may be done to it
    int8, float32: its layers' kernels on the target, dense; none in ``int8`` if it cannot be quantized
    input_noise: the variance of the rounding of one input value, ``scale^2 / 12``
    """

    name: str
    layers: tuple[str, ...]
    weight: str
    rows: np.ndarray
    groups: int
    moments: Moments
    specs: tuple[PruneSpec, ...]
    int8: tuple[LayerWork, ...]
    float32: tuple[LayerWork, ...]
    input_noise: float


def find_subjects(
    mod: IRModule,
    quantized: IRModule,
    samples: Mapping[str, np.ndarray],
    space: Space,
    target: Target,
    threads: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Subject], dict[str, str]]:
    """The weights of the simplified ``mod`` that may be pruned, in execution order, and why each other layer may not.

    ``quantized`` is ``mod`` in int8. Raises what ``input_moments`` does.
    """
    weights = weights_of(mod)
    moments = input_moments(mod, samples, progress=progress)
    records = layers_of(quantized)
    int8 = {work.name: work for work in layer_works(quantized, target, threads) if work.numbers.dtype == "int8"}
    float32 = {work.name: work for work in layer_works(mod, target, threads)}
    readers: dict[str, list[Layer]] = {}
    for layer in find_layers(mod):
        readers.setdefault(layer.weight.name, []).append(layer)
    subjects: list[Subject] = []
    others: dict[str, str] = {}
    for name, layers in readers.items():
        reason = _why_not(layers, weights.get(name), moments, float32)
        if reason is not None:
            others |= {layer.name: reason for layer in layers}
            continue
        scales = [records[layer.name].input_scale or 0.0 for layer in layers]
        first = layers[0]
        subjects.append(
            Subject(
                name=first.name,
                layers=tuple(layer.name for layer in layers),
                weight=name,
                rows=np.ascontiguousarray(first.to_rows(weights[name])),
                groups=_groups(first),
                moments=moments[first.name],
                specs=space.specs(_possible(space.parsed, first)),
                int8=tuple(int8[layer.name] for layer in layers) if all(one.name in int8 for one in layers) else (),
                float32=tuple(float32[layer.name] for layer in layers),
                input_noise=max(scales) ** 2 / 12,
            )
        )
    return subjects, others


def _why_not(
    layers: list[Layer],
    weight: np.ndarray | None,
    moments: Mapping[str, Moments],
    works: Mapping[str, LayerWork],
) -> str | None:
    if weight is None or weight.dtype != np.float32:
        return f"its weight is {'computed' if weight is None else weight.dtype}, not float32"
    if any(layer.name not in moments for layer in layers):
        return "its input does not depend on the model's inputs"
    if any(layer.name not in works for layer in layers):
        return "Pumice has no kernel of its own for it"
    return None


def _possible(patterns: tuple[Pattern, ...], layer: Layer) -> tuple[Pattern, ...]:
    """A depthwise layer's output channels read one input channel each: there are no neighbours."""
    return tuple(pattern for pattern in patterns if not (pattern.needs_neighbours and is_depthwise(layer)))


def _groups(layer: Layer) -> int:
    return int(layer.call.attrs.groups) if layer.operator == "conv2d" else 1
