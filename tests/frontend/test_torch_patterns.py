"""Patterns on tensors, against loops over single weights."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pumice.frontend.torch_patterns import expand, lowest, units
from pumice.patterns import BLOCKS, Pattern

SHAPES = st.one_of(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 3)),
    st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 2), st.integers(1, 3)),
)


def values(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def members(pattern: str, shape: tuple[int, ...]) -> list[list[tuple[int, ...]]]:
    """The weights of each block, blocks by output, kernel position, input."""
    height, width = BLOCKS.get(pattern, (1, 1))
    taps = list(np.ndindex(shape[2:]))
    return [
        [
            (n, c, *tap)
            for n in range(top, min(top + height, shape[0]))
            for c in range(left, min(left + width, shape[1]))
        ]
        for top, tap, left in itertools.product(range(0, shape[0], height), taps, range(0, shape[1], width))
    ]


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.sampled_from(["unstructured", *BLOCKS]))
def test_units_are_sums_over_blocks(shape: tuple[int, ...], name: str) -> None:
    x, pattern = values(shape), Pattern.parse(name)
    wanted = [sum(float(x[index]) for index in block) for block in members(name, shape)]
    found = units(pattern, x)
    np.testing.assert_allclose(found.flatten().numpy(), wanted, rtol=1e-12)
    back = expand(pattern, found, shape)
    for block, total in zip(members(name, shape), found.flatten(), strict=True):
        assert all(back[index] == total for index in block)


@settings(max_examples=60, deadline=None)
@given(st.lists(SHAPES, min_size=1, max_size=3), st.sampled_from(["unstructured", *BLOCKS]), st.floats(0, 1))
def test_the_lowest_blocks_of_all_layers_go(shapes: list[tuple[int, ...]], name: str, share: float) -> None:
    pattern = Pattern.parse(name)
    scores = [units(pattern, values(shape, seed)) for seed, shape in enumerate(shapes)]
    chosen = lowest(pattern, scores, share)
    everything = torch.cat([score.flatten() for score in scores]).tolist()
    gone = torch.cat([part.flatten() for part in chosen]).tolist()
    assert sum(gone) == round(share * len(everything))
    kept = [score for score, out in zip(everything, gone, strict=True) if not out]
    assert all(score <= min(kept, default=1e9) for score, out in zip(everything, gone, strict=True) if out)


def test_of_equals_the_first_goes() -> None:
    chosen = lowest(Pattern.parse("unstructured"), [torch.ones(1, 1, 5)], 0.4)[0]
    assert chosen.flatten().tolist() == [True, True, False, False, False]


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.sampled_from([(1, 2), (2, 4), (1, 4), (4, 8)]))
def test_n_of_m_stay(shape: tuple[int, ...], counts: tuple[int, int]) -> None:
    n, m = counts
    x, pattern = values(shape), Pattern.parse(f"{n}:{m}")
    zero = expand(pattern, lowest(pattern, [units(pattern, x)], pattern.most)[0], shape)
    for row, *tap in itertools.product(range(shape[0]), *map(range, shape[2:])):
        for left in range(0, shape[1], m):
            group = [(row, c, *tap) for c in range(left, min(left + m, shape[1]))]
            best = sorted(group, key=lambda index: float(x[index]), reverse=True)[:n]
            assert {index for index in group if not zero[index]} == set(best)


def test_half_way_to_n_of_m_the_smallest_of_those_that_can_go() -> None:
    pattern = Pattern.parse("2:4")
    score = torch.tensor([[[9.0, 8.0, 7.0, 6.0, 4.0, 3.0, 2.0, 1.0]]])
    assert lowest(pattern, [score], 0.25)[0].flatten().tolist() == [False] * 6 + [True] * 2
    assert lowest(pattern, [score], 0.5)[0].flatten().tolist() == [False, False, True, True] * 2
