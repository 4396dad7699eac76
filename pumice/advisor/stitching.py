"""A network put together from one option for each layer, and how far its outputs are from the dense float ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tvm
from tvm.ir import IRModule

from pumice.advisor.allocation import Choice
from pumice.advisor.layer_options import LayerTable, pruned_rows
from pumice.advisor.subjects import Subject
from pumice.module import weights_of, with_weights
from pumice.passes.evaluate import Evaluator
from pumice.passes.layers import Layer, find_layers
from pumice.passes.prune_spec import PruneSpec, parse_prune
from pumice.passes.quantization_plan import QuantizeSpec
from pumice.passes.quantize import Quantize
from pumice.recipe import Recipe

_CACHE = 1 << 30  # bytes of pruned weights that are kept

Feed = dict[str, np.ndarray]
Outputs = dict[str, np.ndarray]
Run = Callable[[Feed], Outputs]


@dataclass(frozen=True)
class Closeness:
    """Outputs against those of the float model, over samples.

    noise: the energy of the difference over that of the float outputs, the mean of the outputs
    cosine: of the angle between the two, the mean of samples and outputs
    """

    noise: float
    cosine: float


class Reference:
    """What the float model gives for some samples."""

    def __init__(self, run: Run, feeds: Sequence[Feed]) -> None:
        self.feeds = list(feeds)
        self._outputs = [{name: np.array(value) for name, value in run(feed).items()} for feed in self.feeds]

    def closeness(self, run: Run) -> Closeness:
        """How close ``run`` comes on the same samples. What is not finite counts as far as can be."""
        signal: dict[str, float] = {}
        noise: dict[str, float] = {}
        cosines = []
        for feed, expected in zip(self.feeds, self._outputs, strict=True):
            found = run(feed)
            for name, value in expected.items():
                exact, got = value.astype(np.float64).ravel(), found[name].astype(np.float64).ravel()
                signal[name] = signal.get(name, 0.0) + float(exact @ exact)
                noise[name] = noise.get(name, 0.0) + float(np.square(exact - got).sum())
                cosines.append(_cosine(exact, got))
        ratios = [noise[name] / signal[name] if signal[name] > 0 else noise[name] for name in signal]
        total = float(np.mean(ratios))
        return Closeness(total if np.isfinite(total) else 1e9, float(np.nan_to_num(np.mean(cosines), nan=-1.0)))


def _cosine(exact: np.ndarray, found: np.ndarray) -> float:
    sizes = float(np.linalg.norm(exact) * np.linalg.norm(found))
    return float(np.array_equal(exact, found)) if sizes == 0 else float(exact @ found) / sizes


class Stitcher:
    """Builds networks from choices: pruned by the moments of the dense one, in int8 with the dense one's ranges.

    So it is quick, and leaves out what the road of ``compile`` adds: moments and ranges of the pruned network itself,
    equalization, bias correction. It ranks choices; what comes of one is measured on the road.
    """

    def __init__(
        self,
        calibrated: IRModule,
        subjects: Sequence[Subject],
        tables: Sequence[LayerTable],
        keep_float: tuple[str, ...] = (),
    ) -> None:
        """``calibrated`` is the simplified float module with its ranges; ``keep_float`` holds for every choice."""
        self._mod = calibrated
        self._subjects = list(subjects)
        self._tables = list(tables)
        self._keep_float = keep_float
        self._layers: dict[str, Layer] = {layer.name: layer for layer in find_layers(calibrated)}
        self._pruned: OrderedDict[tuple[int, str], np.ndarray] = OrderedDict()

    def evaluator(self, choice: Choice) -> Evaluator:
        """The network, ready to run."""
        weights: dict[str, Any] = dict(weights_of(self._mod))
        floats = []
        for number, option in enumerate(choice):
            subject, chosen = self._subjects[number], self._tables[number].options[option]
            if chosen.prune:
                weights[subject.weight] = self._layers[subject.name].from_rows(self._rows(number, chosen.prune))
            if chosen.dtype == "float32" and subject.int8:
                floats += [glob_of(name) for name in subject.layers]
        mod = with_weights(self._mod, weights)
        spec = QuantizeSpec(keep_float=(*self._keep_float, *floats))
        return Evaluator(tvm.transform.Sequential([Quantize(spec)])(mod))

    def _rows(self, number: int, spec: str) -> np.ndarray:
        key, subject = (number, spec), self._subjects[number]
        if key not in self._pruned:
            self._pruned[key] = pruned_rows(subject.rows, parse_prune(spec), subject.moments)
            while sum(rows.nbytes for rows in self._pruned.values()) > _CACHE and len(self._pruned) > 1:
                self._pruned.popitem(last=False)
        self._pruned.move_to_end(key)
        return self._pruned[key]


def recipe_of(tables: Sequence[LayerTable], choice: Choice, base: Recipe) -> Recipe:
    """``base`` and then each layer as chosen: a specification for all that have the same, in execution order."""
    layers: dict[str, list[str]] = {}
    floats: list[str] = []
    for table, option in zip(tables, choice, strict=True):
        chosen = table.options[option]
        if chosen.prune:
            layers.setdefault(chosen.prune, []).extend(table.layers)
        if chosen.dtype == "float32" and any(other.dtype == "int8" for other in table.options):
            floats += table.layers
    specs: list[PruneSpec] = [
        replace(parse_prune(text), only=tuple(map(glob_of, names))) for text, names in layers.items()
    ]
    return replace(base.pruning((*base.prune, *specs)), keep_float=(*base.keep_float, *map(glob_of, floats)))


def glob_of(name: str) -> str:
    """A pattern that matches a layer's name, written with none of the signs that part a specification."""
    special: Mapping[str, str] = {"*": "[*]", "?": "[?]", "[": "[[]", ":": "?", ",": "?"}
    return "".join(special.get(character, character) for character in name)
