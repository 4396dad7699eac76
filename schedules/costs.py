"""What each form of a layer costs, from measurements: the table behind "sparse or dense".

``bench/kernel_costs.py`` measures it: nanoseconds for one product of a word of weights with a vector of positions
(``convolution``) or of a vector of weights with a word (``gemv``), medians over shapes of ResNet-50 and BERT-base.
Only ratios between the forms of one instruction set matter.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """Nanoseconds a vector product in each form: dense, lists a row (1x4), lists for four rows (4x4)."""

    dense: float
    sparse: float
    shared: float
    gemv_dense: float
    gemv_sparse: float


def costs_of(isa: str, dtype: str) -> Costs:
    """The measurements for an instruction set and the data type of the multiplication (int8, float32)."""
    return _TABLE[isa, dtype]


_TABLE = {
    ("vnni512", "int8"): Costs(0.174, 0.35, 0.22, 0.74, 3.4),
    ("vnni512", "float32"): Costs(0.30, 0.40, 0.32, 0.74, 3.4),
    ("avx512bw", "int8"): Costs(0.45, 0.75, 0.50, 1.1, 4.0),
    ("avx512bw", "float32"): Costs(0.30, 0.40, 0.32, 0.74, 3.4),
    ("avxvnni", "int8"): Costs(0.10, 0.20, 0.13, 0.40, 2.0),
    ("avxvnni", "float32"): Costs(0.15, 0.20, 0.16, 0.40, 2.0),
    ("avx2", "int8"): Costs(0.35, 0.55, 0.40, 0.8, 2.4),
    ("avx2", "float32"): Costs(0.15, 0.20, 0.16, 0.40, 2.0),
    ("portable", "int8"): Costs(1.0, 1.2, 1.0, 1.0, 1.5),
    ("portable", "float32"): Costs(0.10, 0.15, 0.12, 0.25, 1.0),
}
