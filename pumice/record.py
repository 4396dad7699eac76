"""The one record of a layer: each stage adds what it decided; report, manifest and search read it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class LayerRecord:
    """What is known of one layer (a convolution or a matrix product with a weight).

    ``reason`` explains the layer's final form in a sentence: why sparse, why dense, why float.
    """

    name: str  # the weight's source name without its ``.weight``
    operator: str  # conv2d, linear
    weight: str  # the weight's source name
    shape: tuple[int, ...]  # the weight's shape in the graph
    macs: int = 0  # multiply-adds counted as if dense, for the whole input
    source_bytes: int = 0  # weight and bias in the source's data type

    pattern: str = "dense"  # of the zeros: dense, unstructured, 1x4, 4x1, 2x4, 4x4, 16x4, N:M
    sparsity: float = 0.0  # share of zero weights
    block_sparsity: float = 0.0  # share of 1x4 blocks that are all zero
    pruned_by: str = ""  # where the zeros come from: mask in the model, side file, magnitude, zeros found

    dtype: str = "float32"  # what the layer computes in: int8 or float32
    input_scale: float | None = None
    input_zero_point: int | None = None
    output_scale: float | None = None
    output_zero_point: int | None = None

    kernel: str = ""  # e.g. "sparse 1x4 vnni512 8x1", "dense vnni512 4x4", "tvm"
    compiled_bytes: int = 0  # weights, indices, bias and scales as stored
    snr_db: float | None = None  # of the layer's output against the pruned network in float32, over calibration data
    # Noise over signal of the output, for this layer alone on exact inputs: what pruning, weights, activations bring.
    noise: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """A plain dict that ``from_json`` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LayerRecord:
        """Read what ``to_json`` wrote."""
        return cls(**{**data, "shape": tuple(data["shape"])})
