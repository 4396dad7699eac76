"""What a layer costs in each form, from measurements: the table behind "sparse or dense".

``python bench/kernel_costs.py`` measures kernels of many shapes and fits these numbers to their times, here on one
Zen 5 core. Only ratios between the forms of one instruction set matter; ``pumice tune`` replaces the estimate by
measurements of the layer itself. The price of a step was not fitted but set, by comparing whole networks: kernels that
are timed alone do not show it.

The rows of ARM's instruction sets are estimates, for no ARM hardware was at hand: the instructions of each thing, as
LLVM emits them (docs/arm.md), divided by how many of them a core issues a cycle as its maker describes it. ``neon`` is
a Cortex-A53 (in order; a vector instruction a cycle, and none beside a load of 16 bytes, which takes two), ``dotprod``
a Cortex-A76 (two vector instructions and two loads a cycle, four of any kind), ``i8mm`` a Neoverse V1 (four, three,
eight). What a miss, an unaligned load or a loop's end costs is guessed. ``pumice tune`` on the board replaces them.
"""

from __future__ import annotations

from dataclasses import dataclass

from pumice.schedules.tiling import DENSE, FORMS, L1_SIZE, Extent, Form, Tiling, tilings
from pumice.targets.isa import Isa


@dataclass(frozen=True)
class Costs:
    """Nanoseconds for one of each; the time of a kernel is taken for their sum.

    product: a word of weights times a vector of positions
    load: a vector of positions; unaligned, missed: what it costs more if it crosses lines, or is not in L1
    operand: a word of weights or an offset, for a tile of positions
    step: a list in one tile of positions: its loop ends where no CPU can foresee
    output: the epilogue of a vector; waiting: an accumulator that is put aside and taken up again
    gemv_dense, gemv_sparse: an entry of the kernel for few positions, when there is one
    """

    product: float
    load: float
    unaligned: float
    missed: float
    operand: float
    step: float
    output: float
    waiting: float
    gemv_dense: float
    gemv_sparse: float


def features(extent: Extent, form: Form, entries: int, tiling: Tiling) -> dict[str, float]:
    """How many of each thing that ``Costs`` prices a kernel does; ``entries`` are its blocks, fill-in included."""
    tiles, cuts = -(-extent.vectors // tiling.vectors), -(-extent.words // tiling.words)
    loads = entries * extent.vectors
    missed = max(0.0, 1 - L1_SIZE / max(extent.touched(tiling), 1))
    return {
        "product": loads * form.shared,
        "load": loads,
        "unaligned": loads * extent.unaligned,
        "missed": 0.0 if form.is_dense else loads * missed,  # in order, the next lines are fetched ahead
        "operand": entries * tiles * (form.shared + (not form.is_dense)),
        "step": 0.0 if form.is_dense else extent.rows // form.shared * cuts * tiles,
        "output": extent.rows * extent.vectors,
        "waiting": extent.rows * extent.vectors * (cuts - 1),
    }


def estimate(extent: Extent, form: Form, entries: int, tiling: Tiling, costs: Costs) -> float:
    """Nanoseconds on one thread."""
    prices: dict[str, float] = vars(costs)
    return sum(prices[name] * count for name, count in features(extent, form, entries, tiling).items())


def price_of_entry(is_dense: bool, positions: int, costs: Costs) -> float:
    """Nanoseconds for an entry of the kernel for few positions (``schedules/gemv.py``).

    Sparse, each position picks its words anew. Dense, the weights are what takes time: each position but the first
    takes a product, and an operand in all lanes.
    """
    if not is_dense:
        return positions * costs.gemv_sparse
    return costs.gemv_dense + (positions - 1) * min(costs.gemv_dense, costs.product + costs.operand)


def fastest(extent: Extent, form: Form, entries: int, isa: Isa, threads: int, costs: Costs) -> tuple[float, Tiling]:
    """The best of the form's tilings by the estimate, and its nanoseconds."""
    found = [(estimate(extent, form, entries, t, costs), t) for t in tilings(extent, form, isa, threads)]
    return min(found, key=lambda pair: pair[0])


def break_even(extent: Extent, isa: Isa, threads: int, costs: Costs) -> float:
    """The share of zero 1x4 blocks, anywhere in the weight, from which on some sparse form is faster than dense."""
    total = extent.rows * extent.words * extent.taps
    dense = fastest(extent, DENSE, total // DENSE.shared, isa, threads, costs)[0]

    def pays(zeros: float) -> bool:
        for form in FORMS[1:]:
            present = (1 - zeros**form.shared) * total / form.shared  # some of the rows that share has the block
            if fastest(extent, form, round(present), isa, threads, costs)[0] < dense:
                return True
        return False

    low, high = 0.0, 1.0
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (low, middle) if pays(middle) else (middle, high)
    return high


def costs_of(isa: str, dtype: str) -> Costs:
    """The measurements for an instruction set and the data type of the multiplication (int8, float32)."""
    return _TABLE[isa, dtype]


_TABLE = {
    ("vnni512", "int8"): Costs(0.0742, 0.1316, 0.0741, 0.1734, 0.0789, 2.0000, 0.2676, 0.7523, 0.5500, 0.8030),
    ("vnni512", "float32"): Costs(0.0756, 0.1585, 0.0811, 0.1565, 0.0452, 2.0000, 0.3933, 0.4897, 0.5250, 0.7850),
    ("avx512bw", "int8"): Costs(0.3461, 0.1260, 0.0000, 0.1025, 0.0267, 2.0000, 0.4063, 0.3820, 0.7120, 1.3930),
    ("avx512bw", "float32"): Costs(0.0791, 0.1512, 0.0834, 0.1516, 0.0382, 2.0000, 0.2710, 0.5656, 0.5900, 0.9220),
    ("avxvnni", "int8"): Costs(0.1238, 0.1033, 0.0248, 0.0643, 0.0447, 2.0000, 0.1057, 0.1218, 0.2970, 0.5640),
    ("avxvnni", "float32"): Costs(0.1289, 0.1095, 0.0337, 0.0778, 0.0453, 2.0000, 0.0000, 0.0000, 0.3320, 0.5950),
    ("avx2", "int8"): Costs(0.3501, 0.0847, 0.0000, 0.2252, 0.1175, 2.0000, 0.3443, 6.2401, 0.5540, 0.9300),
    ("avx2", "float32"): Costs(0.1277, 0.1050, 0.0403, 0.0723, 0.0588, 2.0000, 0.0000, 0.0000, 0.3360, 0.5980),
    # In cycles, estimated and never measured: see the module's docstring.
    ("neon", "int8"): Costs(4.0, 2.0, 0.5, 4.0, 2.0, 15.0, 6.0, 4.0, 6.5, 20.0),
    ("neon", "float32"): Costs(1.0, 2.0, 0.5, 4.0, 2.0, 15.0, 3.0, 4.0, 3.5, 17.0),
    ("dotprod", "int8"): Costs(0.5, 0.12, 0.12, 0.6, 0.2, 14.0, 3.0, 1.0, 1.0, 5.1),
    ("dotprod", "float32"): Costs(0.5, 0.12, 0.12, 0.6, 0.2, 14.0, 1.5, 1.0, 1.0, 5.1),
    ("i8mm", "int8"): Costs(0.25, 0.12, 0.06, 0.4, 0.1, 14.0, 1.5, 0.7, 0.6, 2.6),
    ("i8mm", "float32"): Costs(0.25, 0.12, 0.06, 0.4, 0.1, 14.0, 0.8, 0.7, 0.6, 2.6),
    ("portable", "int8"): Costs(0.7779, 0.0467, 0.0000, 0.0170, 0.5572, 2.0000, 0.4774, 0.0000, 1.2080, 1.7620),
    ("portable", "float32"): Costs(0.1972, 0.0288, 0.0000, 0.0737, 0.0359, 2.0000, 0.0411, 0.0191, 0.1890, 0.9870),
    # Nothing was measured: instructions of the kernels in schedules/cuda, for a thread with four positions.
    ("cuda", "int8"): Costs(1, 1, 0, 0, 0.125, 0, 4, 8, 1, 2),
    ("cuda", "float32"): Costs(1, 1, 0, 0, 0.125, 0, 4, 8, 1, 2),
}
