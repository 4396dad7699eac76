"""The CUDA kernels of layers with many positions, and with one, against the definition: the same integers as a CPU's.

They run on this CPU (``targets/cuda_emulation.py``), each with its threads in order and in reverse order.
"""

import numpy as np
import pytest
import reference
from cuda_kernels import Case, run_cases
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernels import blocks_of, conv_float, fold_zero_point, geometry_for, output_size
from reference import Residual as ReferenceResidual
from reference import conv_accumulate, conv_int8, layer_float32

from pumice.errors import UnsupportedError
from pumice.schedules.cuda.layer import CudaLayer
from pumice.schedules.cuda.tiling import SHARED_LIMIT, Tiling, tilings
from pumice.schedules.epilogue import Epilogue, Residual
from pumice.schedules.functions import ACTIVATIONS
from pumice.schedules.geometry import Window
from pumice.schedules.places import Places

FORMS = ("dense", "1x4", "2x4", "4x4")
ANYTHING = Epilogue("float32", None, 0, -np.inf, np.inf)


def weights(rng, shape, density, form):
    """int8 OIHW with whole blocks missing; some rows are empty and some full."""
    n, c, kh, kw = shape
    rows = 1 if form == "dense" else int(form[0])
    keep = rng.random((-(-n // rows), 1, -(-c // 4), 1, kh, kw)) < density
    keep[rng.random(len(keep)) < 0.2] = False
    keep[rng.random(len(keep)) < 0.2] = True
    keep = np.repeat(keep.repeat(rows, axis=1).reshape(-1, keep.shape[2], 1, kh, kw)[:n], 4, axis=2)
    return (rng.integers(-128, 128, shape) * keep.reshape(n, -1, kh, kw)[:, :c]).astype(np.int8)


class Int8:
    """A layer of random numbers, and what must come out of it."""

    def __init__(
        self, seed, x_shape, n, window=None, form="dense", *, groups=1, density=0.4, zx=3, zy=5, residual=False,
        clamp=(0, 255), output="uint8", after=None, x=None, weight=None, tiling=None,
    ):  # fmt: skip
        rng, window = np.random.default_rng(seed), window or Window((1, 1))
        x = rng.integers(0, 256, x_shape).astype(np.uint8) if x is None else x
        if weight is None:
            weight = weights(rng, (n, x_shape[1] // groups, *window.kernel), density, form)
        bias = rng.integers(-3000, 3000, n).astype(np.int32)
        m = (rng.random(n) * 2e-3 / np.sqrt(weight[0].size)).astype(np.float32)
        after = window.padding if after is None else after
        around = (*window.padding, *after)
        other, spec, epilogue = None, None, ANYTHING
        if output == "uint8":
            if residual:
                size = output_size(x.shape[2:], window, after)
                other = rng.integers(0, 256, (x.shape[0], n, *size)).astype(np.uint8)
                spec = Residual(float(np.float32(0.37)), 129)
            epilogue = Epilogue("uint8", spec, zy, *clamp)
        self.case = Case(x, weight, window, form, groups, zx, fold_zero_point(weight, bias, zx), m, epilogue, other,
                         after, tiling)  # fmt: skip
        self.padding = zy if output == "uint8" else 0
        if output == "float32":
            acc = conv_accumulate(x, zx, weight, bias, window.stride, around, window.dilation, groups)
            self.want = layer_float32(acc, m.reshape(1, -1, 1, 1))
            return
        reference_residual = None if other is None else ReferenceResidual(other, spec.zero_point, spec.multiplier)
        self.want = conv_int8(
            x, zx, weight, bias, m, zy, reference_residual, *clamp, window.stride, around, window.dilation, groups
        )


def check(layers):
    for layer, (got, padding) in zip(layers, run_cases([layer.case for layer in layers]), strict=True):
        np.testing.assert_array_equal(got, layer.want)
        assert (padding == layer.padding).all()


windows = st.builds(
    lambda k, s, d, p: Window(k, s, d, (p[0] % (k[0] * d[0]), p[1] % (k[1] * d[1]))),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 2)]),
    st.sampled_from([(1, 1), (1, 1), (2, 1), (2, 2)]),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
some_tilings = st.builds(
    Tiling, st.sampled_from([1, 2, 4]), st.integers(1, 3), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 3, 64]),
    st.sampled_from([True, True, True, False]),
)  # fmt: skip


@st.composite
def layers(draw):
    window = draw(windows)
    size, after = draw(st.tuples(st.integers(1, 9), st.integers(1, 40))), draw(st.tuples(*[st.integers(0, 2)] * 2))
    assume(min(output_size(size, window, after)) > 0)
    clamp, zy = draw(st.sampled_from([(0, 255), (5, 255), (5, 77), (200, 220)])), draw(st.sampled_from([0, 5, 255]))
    return Int8(
        draw(st.integers(0, 10**6)), (draw(st.integers(1, 3)), draw(st.integers(1, 21)), *size),
        draw(st.integers(1, 18)), window, draw(st.sampled_from(FORMS)), zx=draw(st.sampled_from([0, 3, 128, 255])),
        zy=zy, residual=draw(st.booleans()), clamp=(min(clamp[0], zy) if clamp[0] == 5 else clamp[0], clamp[1]),
        output=draw(st.sampled_from(["uint8", "uint8", "float32"])), after=after, tiling=draw(some_tilings),
    )  # fmt: skip


@settings(max_examples=3)  # of which the first is the simplest
@given(st.lists(layers(), min_size=20, max_size=20))
def test_int8_equals_the_definition(batch):
    check(batch)


def test_sizes_that_no_tile_divides():
    """Several tiles of positions, rows and the reduction, each with a rest; stride phases; halos; a residual."""
    around = Window((3, 3), padding=(1, 1))
    check(
        [Int8(1, (2, 22, 11, 27), 13, around, form, residual=True) for form in FORMS]
        + [Int8(2, (1, 301, 1, 150), 75, form=form, residual=True) for form in FORMS]
        + [
            Int8(6, (1, 9, 3, 70), 9, around, form, tiling=Tiling(2, 1, 2, 2, copies=False))
            for form in ("dense", "1x4")
        ]
        + [Int8(3, (2, 7, 15, 34), 9, Window((7, 7), (2, 2), padding=(3, 3)), form) for form in ("dense", "1x4")]
    )


def test_extremes_do_not_saturate():
    layers = []
    for stored, weight in ((255, -128), (255, 127), (0, -128)):
        x, w = np.full((1, 64, 1, 40), stored, np.uint8), np.full((8, 64, 1, 1), weight, np.int8)
        layers += [Int8(2, x.shape, 8, form=form, x=x, weight=w, zx=0, output="float32") for form in ("dense", "1x4")]
    check(layers)


def test_weights_of_zeros_leave_the_bias_and_groups_are_block_sparse():
    zeros = np.zeros((6, 9, 3, 3), np.int8)
    grouped = [(8, 8, 8), (12, 6, 3), (10, 10, 10), (6, 12, 6)]
    strided = Window((3, 3), stride=(2, 2), padding=(1, 1))
    check(
        [Int8(3, (1, 9, 5, 6), 6, Window((3, 3), padding=(1, 1)), form, weight=zeros, zx=255) for form in FORMS]
        + [
            Int8(4, (2, channels, 7, 8), n, strided, form, groups=groups, density=1.0, zx=17)
            for (channels, n, groups), form in zip(grouped, FORMS, strict=True)
        ]
    )


def test_one_position():
    """A matrix times a vector: a warp for each quad of rows; more blocks than a warp has threads, and fewer."""
    check(
        [
            Int8(n, (1, k, 1, 1), n, form=form, residual=n % 2 == 1, clamp=(7, 99), zy=9)
            for form in FORMS
            for n, k in ((1, 13), (37, 515), (70, 9))
        ]
        + [Int8(5, (1, 40, 1, 1), 6, form=form, output="float32") for form in FORMS]
        + [Int8(6, (1, 9, 2, 2), 6, Window((2, 2), (2, 2)), form=form) for form in FORMS]
    )


def test_ties_round_to_even():
    """Accumulators of odd numbers times one half lie exactly between two integers."""
    x = np.arange(256, dtype=np.uint8).reshape(1, 1, 4, 64)
    case = Case(x, np.ones((4, 1, 1, 1), np.int8), m=np.full(4, 0.5, np.float32), epilogue=Epilogue("uint8", None, 3))
    np.testing.assert_array_equal(run_cases([case])[0][0][0, 0].ravel(), np.rint(np.arange(256) / 2) + 3)


def test_activations():
    rng = np.random.default_rng(7)
    x, weight = rng.integers(0, 256, (1, 20, 1, 60)).astype(np.uint8), weights(rng, (6, 20, 1, 1), 0.7, "1x4")
    bias, m = rng.integers(-900, 900, 6).astype(np.int32), (rng.random(6) * 4e-4).astype(np.float32)
    r = rng.integers(0, 256, (1, 6, 1, 60)).astype(np.uint8)
    sy, zy, mr = 0.013, 40, float(np.float32(0.011))
    acc = conv_accumulate(x, 0, weight, bias)
    cases, wants = [], []
    for i, name in enumerate(ACTIVATIONS):
        spec, other = (Residual(mr, 99), r) if i % 2 else (None, None)
        epilogue = Epilogue("uint8", spec, zy, 0, 255, name, float(np.float32(1 / sy)))
        cases.append(Case(x, weight, form="1x4", bias=bias, m=m, epilogue=epilogue, residual=other))
        added = ReferenceResidual(r, 99, mr) if i % 2 else None
        wants.append(reference.requantize(acc, m.reshape(1, -1, 1, 1), zy, added, activation=name, sy=sy))
    for (got, _), want in zip(run_cases(cases), wants, strict=True):
        np.testing.assert_array_equal(got, want)


@st.composite
def float_layers(draw):
    rng, window = np.random.default_rng(draw(st.integers(0, 10**6))), draw(windows)
    size, form = draw(st.tuples(st.integers(1, 7), st.integers(1, 40))), draw(st.sampled_from(FORMS))
    assume(min(output_size(size, window)) > 0)
    x = rng.standard_normal((draw(st.integers(1, 2)), draw(st.integers(1, 13)), *size)).astype(np.float32)
    n = draw(st.integers(1, 10))
    present = weights(rng, (n, x.shape[1], *window.kernel), 0.5, form) != 0
    weight = (rng.standard_normal(present.shape) * present).astype(np.float32)
    other = rng.standard_normal((len(x), n, *output_size(size, window))) if draw(st.booleans()) else None
    other = None if other is None else other.astype(np.float32)
    clamp = draw(st.sampled_from([(-np.inf, np.inf), (0.0, np.inf), (0.0, 6.0)]))
    epilogue = Epilogue("float32", None if other is None else Residual(), 0, *clamp)
    bias = rng.standard_normal(n).astype(np.float32)
    return Case(x, weight, window, form, bias=bias, epilogue=epilogue, residual=other, tiling=draw(some_tilings))


@settings(max_examples=2)
@given(st.lists(float_layers(), min_size=16, max_size=16))
def test_float_is_close_to_the_definition(cases):
    """Within rtol 1e-5 of sqrt(K) times the largest term: sums in another order."""
    for case, (got, padding) in zip(cases, run_cases(cases), strict=True):
        want = conv_float(case.x, case.weight, case.window) + case.bias.reshape(1, -1, 1, 1)
        want = np.clip(want + (0 if case.residual is None else case.residual), case.epilogue.low, case.epilogue.high)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.sqrt(case.weight[0].size) * 3)
        assert (padding == 0).all()


# The search space.


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("shape", "window"),
    [
        ((1, 768, 1, 128), Window((1, 1))),
        ((1, 512, 7, 7), Window((3, 3), padding=(1, 1))),
        ((1, 3, 224, 224), Window((7, 7), (2, 2), padding=(3, 3))),
        ((8, 64, 56, 56), Window((3, 3), (2, 2), padding=(1, 1))),
        ((1, 8, 90, 3000), Window((5, 5), padding=(2, 2))),
    ],
)
def test_candidates_fit_shared_memory(form, shape, window):
    n = 256
    out = (shape[0], n, *output_size(shape[2:], window))
    target = geometry_for(shape, out, window)
    places = Places(window, target, target)
    rng = np.random.default_rng(9)
    blocks = blocks_of(weights(rng, (n, shape[1], *window.kernel), 0.1, form), 1, form)
    candidates = tilings(blocks, places)
    works = [CudaLayer.of(blocks.tiled(tiling.words), 1, places, tiling, Epilogue()) for tiling in candidates]
    sizes = [4 * (work.slab_words + work.list_words) for work in works]
    assert sizes[-1] <= SHARED_LIMIT and not candidates[-1].copies
    assert sum(size <= SHARED_LIMIT for size in sizes) > 3 or shape[3] == 3000  # whose rows are too long to copy


def test_a_tiling_that_does_not_fit_is_refused():
    case = Int8(1, (1, 2000, 1, 200), 64, tiling=Tiling(8, 2, 4, 500)).case
    with pytest.raises(UnsupportedError, match="shared memory, which has 49152; use a smaller tiling"):
        run_cases([case])
