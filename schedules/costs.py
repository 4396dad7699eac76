"""What each form of a layer costs, from measurements: the table behind "sparse or dense".

``python bench/kernel_costs.py`` measures it, here on one Zen 5 core: nanoseconds for one product of a word of weights
with a vector of positions (convolution) or of a vector of weights with a word (gemv), medians over shapes of ResNet-50
and BERT-base. Only ratios between the forms of one instruction set matter.
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
    ("vnni512", "int8"): Costs(0.160, 0.363, 0.187, 0.695, 3.535),
    ("vnni512", "float32"): Costs(0.174, 0.417, 0.179, 1.274, 3.609),
    ("avx512bw", "int8"): Costs(0.431, 0.563, 0.464, 0.976, 3.616),
    ("avx512bw", "float32"): Costs(0.177, 0.424, 0.184, 1.271, 3.694),
    ("avxvnni", "int8"): Costs(0.256, 0.290, 0.259, 0.466, 1.820),
    ("avxvnni", "float32"): Costs(0.288, 0.297, 0.275, 0.739, 1.831),
    ("avx2", "int8"): Costs(0.446, 0.573, 0.497, 0.798, 1.803),
    ("avx2", "float32"): Costs(0.292, 0.308, 0.282, 0.773, 1.849),
    ("portable", "int8"): Costs(1.095, 1.151, 1.131, 1.607, 1.858),
    ("portable", "float32"): Costs(0.284, 0.277, 0.285, 0.545, 1.050),
}
