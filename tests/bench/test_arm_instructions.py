"""What counts as a product or a memory access, and a layer that is small enough to count by hand."""

import pytest
from emulation import emulator

from bench.arm_instructions import _MEMORY, _PRODUCTS, count, table
from bench.layer_shapes import LayerShape
from pumice.errors import MissingDependencyError
from pumice.targets.target import Target
from pumice.targets.toolchain import find_toolchain


@pytest.mark.parametrize(
    ("word", "is_product", "is_memory"),
    [
        (0x4E829420, True, False),  # sdot v0.4s, v1.16b, v2.16b
        (0x4FBDEBDF, True, False),  # sdot v31.4s, v30.16b, v29.4b[3]
        (0x4E829C20, True, False),  # usdot v0.4s, v1.16b, v2.16b
        (0x4FBDFBDF, True, False),  # usdot v31.4s, v30.16b, v29.4b[3]
        (0x4E82A420, True, False),  # smmla v0.4s, v1.16b, v2.16b
        (0x4E9DAFDF, True, False),  # usmmla v31.4s, v30.16b, v29.16b
        (0x0E22C020, True, False),  # smull v0.8h, v1.8b, v2.8b
        (0x4E3DC3DF, True, False),  # smull2 v31.8h, v30.16b, v29.16b
        (0x4E3D83DF, True, False),  # smlal2 v31.8h, v30.16b, v29.16b
        (0x0E7DC3DF, False, False),  # smull v31.4s, v30.4h, v29.4h
        (0x4EA29C20, False, False),  # mul v0.4s, v1.4s, v2.4s
        (0x4E606820, False, False),  # sadalp v0.4s, v1.8h
        (0x4E22CC20, False, False),  # fmla v0.4s, v1.4s, v2.4s
        (0x8B020020, False, False),  # add x0, x1, x2
        (0x3DC00020, False, True),  # ldr q0, [x1]
        (0xAD41787F, False, True),  # ldp q31, q30, [x3, 32]
        (0x4D40C820, False, True),  # ld1r {v0.4s}, [x1]
        (0x4CDF7820, False, True),  # ld1 {v0.4s}, [x1], 16
        (0xADBF0BE1, False, True),  # stp q1, q2, [sp, -32]!
    ],
)
def test_instructions_are_known_by_their_bits(word, is_product, is_memory):
    assert any(word & mask == bits for mask, bits in _PRODUCTS) == is_product
    assert any(word & mask == bits for mask, bits in _MEMORY) == is_memory


def test_a_layer_is_counted(tmp_path):
    emulator("max")
    target, shape = Target.parse("armv8.2-a+dotprod"), LayerShape(64, 16, 32)
    try:
        find_toolchain(target, "musl")
    except MissingDependencyError as error:
        pytest.skip(str(error))
    counts = []
    for pattern in ("dense", "1x4"):
        folder = tmp_path / pattern
        folder.mkdir()
        counts.append(count(shape, pattern, target, folder))
    dense, sparse = counts
    assert dense.useful == shape.macs and sparse.useful == round(shape.macs / 10)
    assert dense.products == shape.macs // 16  # one sdot for sixteen multiply-adds, and no other product
    assert sparse.products < dense.products / 5
    assert sparse.instructions < dense.instructions
    assert f"{dense.per_sixteen:.2f}" in table(counts)
