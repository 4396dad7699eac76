"""What every layer could be: for each pattern and level the error that it brings, and its time and bytes on the target.

    conv2   int8                  error 0.0001   0.72 ms   147 kB
            sparsegpt:1x4:0.5     error 0.0031   0.41 ms    93 kB
            sparsegpt:1x4:0.9     error 0.12     0.11 ms    19 kB
            float32               error 0        1.9 ms    590 kB

Errors are noise over signal of the layer's output, from the second moments of its input: nothing is run. Times are
measured here, or from a tuning database, or estimated by the cost table, and each says which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from typing import Any

import numpy as np

from pumice.advisor.subjects import Subject
from pumice.kernel_times import measure
from pumice.passes.choose_kernel import Chooser, candidates, estimated_time
from pumice.passes.layer_kernel import LayerWork, Numbers
from pumice.passes.prune_rows import prune_rows
from pumice.passes.prune_spec import PruneSpec, parse_prune
from pumice.passes.statistics import Moments, output_energy, output_error
from pumice.schedules.blocks import expand_groups
from pumice.schedules.measurements import Journal, Measurement, Measurements
from pumice.targets.isa import Isa, isa
from pumice.targets.target import Target

MEASURED, DATABASE, ESTIMATED = "measured here", "tuning database", "cost table"
_LEVELS = 127  # of a weight in int8, on either side of zero


@dataclass(frozen=True)
class LayerOption:
    """One form of one weight.

    prune: a specification for it alone, empty for dense; dtype: int8 or float32
    pruning, weights, activations: noise over signal of the layer's output, by the zeros alone, by the zeros and the
        rounding of the weights together, and by the rounding of the inputs
    nanoseconds: of one inference, all layers with this weight; source: of the time; nbytes: as stored
    """

    prune: str
    dtype: str
    sparsity: float
    pruning: float
    weights: float
    activations: float
    nanoseconds: float
    source: str
    nbytes: int

    @property
    def error(self) -> float:
        """Noise over signal of the layer's output: the sources are independent."""
        return self.weights + self.activations

    @property
    def label(self) -> str:
        """``sparsegpt:1x4:0.9``, ``int8``, ``float32``; a pruned layer that stays float says both."""
        if not self.prune:
            return self.dtype
        return self.prune if self.dtype == "int8" else f"{self.prune} float32"

    def to_json(self) -> dict[str, Any]:
        """A plain dict that ``LayerOption(**...)`` reads back; its label and error are not in it."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class LayerTable:
    """The options of one weight."""

    name: str
    layers: tuple[str, ...]
    weight: str
    options: tuple[LayerOption, ...]

    def dense(self) -> int:
        """Which option is the dense one: int8 where there is such a one."""
        plain = [i for i, option in enumerate(self.options) if not option.prune]
        return min(plain, key=lambda i: self.options[i].dtype != "int8")

    def index(self, label: str) -> int:
        """Which option is called so. Raises ValueError where none is."""
        return [option.label for option in self.options].index(label)


def options_of(subject: Subject, isa: Isa, measured: Measurements | None = None) -> tuple[LayerOption, ...]:
    """All options of a weight: those of ``specs``, then dense int8 and float32.

    A time is the fastest that was ``measured`` for such a kernel, else the cost table's.
    """
    dtypes = ("int8", "float32") if subject.int8 else ("float32",)
    found = []
    for spec in subject.specs:
        pruned = pruned_rows(subject.rows, spec, subject.moments)
        found.append(_option(subject, str(spec), pruned, dtypes[0], isa, measured))
    found += [_option(subject, "", subject.rows, dtype, isa, measured) for dtype in dtypes]
    return tuple(found)


def pruned_rows(rows: np.ndarray, spec: PruneSpec, moments: Moments) -> np.ndarray:
    """``rows`` by ``spec``, whose amount the spec says itself."""
    return prune_rows(rows, spec, float(getattr(spec, "amount", 0.0)), moments)


def layer_tables(
    subjects: Sequence[Subject],
    target: Target,
    measured: Measurements | None = None,
    processes: int = 1,
    tell: Callable[[LayerTable], None] = lambda table: None,
) -> list[LayerTable]:
    """The options of all weights, each told of when it is done; in so many ``processes``.

    More than one process import the caller's main module anew, which must not start its work when it is imported.
    """
    found: dict[str, LayerTable] = {}
    for subject, options in _computed(subjects, target.isa, measured, processes):
        found[subject.weight] = LayerTable(subject.name, subject.layers, subject.weight, options)
        tell(found[subject.weight])
    return [found[subject.weight] for subject in subjects]


def measure_options(
    subject: Subject, table: LayerTable, journal: Journal, target: Target, threads: int, seconds: float
) -> LayerTable:
    """``table`` with the times of its kernels measured on this machine, as far as ``journal`` does not have them.

    Whoever calls this lets nothing else run. Raises what ``kernel_times.measure`` does.
    """
    options = []
    for option in table.options:
        rows = subject.rows
        if option.prune:
            rows = pruned_rows(rows, parse_prune(option.prune), subject.moments)
        total = 0.0
        for work in _works(subject, rows, option.dtype):
            times = journal.measurements.of(work.workload)
            if not any(form.is_dense for form, _ in times):
                times = measure(work, candidates(work, target.instructions), target, threads, seconds)
                journal.add([Measurement(work.workload, *item) for item in times.items()])
            total += min(times.values())
        options.append(replace(option, nanoseconds=total, source=MEASURED))
    return replace(table, options=tuple(options))


def quantized_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``rows`` in int8, symmetric, a scale for each output channel, and what these stand for, float32."""
    largest = np.abs(rows).max((1, 2), initial=0, keepdims=True).astype(np.float64)
    scale = np.where(largest > 0, largest / _LEVELS, 1.0)
    steps = np.rint(rows / scale).astype(np.int8)
    return steps, (steps * scale).astype(np.float32)


def _computed(
    subjects: Sequence[Subject], isa_name: str, measured: Measurements | None, processes: int
) -> Iterator[tuple[Subject, tuple[LayerOption, ...]]]:
    if processes == 1 or len(subjects) < 2:
        for subject in subjects:
            yield subject, options_of(subject, isa(isa_name), measured)
        return
    # Not by fork: the compiler's threads would be gone in the child, and what they hold locked would stay so.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        largest_first = sorted(subjects, key=lambda subject: -subject.rows.size)
        jobs = {pool.submit(_options_by_name, subject, isa_name, measured): subject for subject in largest_first}
        try:
            for job in as_completed(jobs):
                yield jobs[job], job.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _options_by_name(subject: Subject, isa_name: str, measured: Measurements | None) -> tuple[LayerOption, ...]:
    return options_of(subject, isa(isa_name), measured)


def _option(
    subject: Subject, prune: str, rows: np.ndarray, dtype: str, isa: Isa, measured: Measurements | None
) -> LayerOption:
    values = quantized_rows(rows)[1] if dtype == "int8" else rows
    times, sources, sizes = [], [], []
    chooser = Chooser(measured=measured)
    for work in _works(subject, rows, dtype):
        known = measured.of(work.workload) if measured else {}
        choice = chooser.choose(work, isa)
        has_dense = any(form.is_dense for form, _ in known)
        times.append(min(known.values()) if has_dense else estimated_time(work, choice, isa))
        sources.append(DATABASE if has_dense else ESTIMATED)
        multiplier = 0 if work.numbers.multiplier is None else work.numbers.multiplier.nbytes
        sizes.append(choice.nbytes + work.numbers.bias.nbytes + multiplier)
    return LayerOption(
        prune=prune,
        dtype=dtype,
        sparsity=float(np.mean(rows == 0)) if rows.size else 0.0,
        pruning=output_error(subject.rows, rows, subject.moments),
        weights=output_error(subject.rows, values, subject.moments),
        activations=_activation_error(subject, values) if dtype == "int8" else 0.0,
        nanoseconds=float(sum(times)),
        source=ESTIMATED if ESTIMATED in sources else DATABASE,
        nbytes=max(sizes, default=0),
    )


def _works(subject: Subject, rows: np.ndarray, dtype: str) -> list[LayerWork]:
    """The layers' kernels with ``rows`` in place of the dense ones."""
    inside = expand_groups(quantized_rows(rows)[0] if dtype == "int8" else rows, subject.groups)
    works = subject.int8 if dtype == "int8" else subject.float32
    return [replace(work, numbers=Numbers(inside, work.numbers.bias, work.numbers.multiplier)) for work in works]


def _activation_error(subject: Subject, values: np.ndarray) -> float:
    """Rounding adds the same variance to each input, independently: ``|v|^2 variance`` in each output channel."""
    signal = output_energy(subject.rows, subject.moments)
    noise = subject.input_noise * float(np.square(values, dtype=np.float64).sum())
    return noise / signal if signal > 0 else 0.0
