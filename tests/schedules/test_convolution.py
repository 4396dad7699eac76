"""The kernel of layers with many positions, against the definition: the same integers on every instruction set."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernels import ALL_ISAS, RUNNABLE, conv_float, convolve, fold_zero_point, output_size
from reference import Residual as ReferenceResidual
from reference import conv_accumulate, conv_int8, layer_float32

from pumice.schedules.epilogue import Epilogue, Residual
from pumice.schedules.geometry import Window

FORMS = ("dense", "1x4", "4x4")


def weights(rng, shape, density, form):
    """int8 OIHW with whole blocks missing; some rows are empty and some full."""
    n, c, kh, kw = shape
    words = -(-c // 4)
    rows = 4 if form == "4x4" else 1
    keep = rng.random((-(-n // rows), 1, words, 1, kh, kw)) < density
    keep[rng.random(len(keep)) < 0.2] = False
    keep[rng.random(len(keep)) < 0.2] = True
    keep = np.repeat(keep.repeat(rows, axis=1).reshape(-1, words, 1, kh, kw)[:n], 4, axis=2).reshape(n, -1, kh, kw)
    return (rng.integers(-128, 128, shape) * keep[:, :c]).astype(np.int8)


def check_int8(
    isa_name,
    seed,
    x_shape,
    n,
    window,
    form,
    *,
    groups=1,
    density=0.4,
    zx=3,
    zy=5,
    residual=False,
    clamp=(0, 255),
    output="uint8",
    after=None,
    threads=1,
    weight=None,
    x=None,
):
    """One layer with random numbers: every stored byte equals the definition, padding holds the zero point."""
    rng = np.random.default_rng(seed)
    if x is None:
        x = rng.integers(0, 256, x_shape).astype(np.uint8)
    if weight is None:
        weight = weights(rng, (n, x_shape[1] // groups, *window.kernel), density, form)
    bias = rng.integers(-3000, 3000, n).astype(np.int32)
    m = (rng.random(n) * 2e-3 / np.sqrt(weight[0].size)).astype(np.float32)
    after = window.padding if after is None else after
    padding = (*window.padding, *after)
    size = output_size(x.shape[2:], window, after)
    other, spec = None, None
    if residual and output == "uint8":
        other = rng.integers(0, 256, (x.shape[0], n, *size)).astype(np.uint8)
        spec = Residual(float(np.float32(0.37)), 129)
    numbers = {"form": form, "groups": groups, "zx": zx, "m": m, "residual": other, "after": after, "threads": threads}
    numbers["bias"] = fold_zero_point(weight, bias, zx)
    if output == "float32":
        epilogue = Epilogue("float32", None, 0, float("-inf"), float("inf"))
        got, margin = convolve(isa_name, x, weight, window, epilogue=epilogue, **numbers)
        acc = conv_accumulate(x, zx, weight, bias, window.stride, padding, window.dilation, groups)
        np.testing.assert_array_equal(got, layer_float32(acc, m.reshape(1, -1, 1, 1)))
        assert (margin == 0).all()
        return
    got, margin = convolve(isa_name, x, weight, window, epilogue=Epilogue("uint8", spec, zy, *clamp), **numbers)
    reference = None if other is None else ReferenceResidual(other, spec.zero_point, spec.multiplier)
    want = conv_int8(x, zx, weight, bias, m, zy, reference, *clamp, window.stride, padding, window.dilation, groups)
    np.testing.assert_array_equal(got, want)
    assert (margin == zy).all()


windows = st.builds(
    lambda k, s, d, p: Window(k, s, d, (p[0] % (k[0] * d[0]), p[1] % (k[1] * d[1]))),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 2)]),
    st.sampled_from([(1, 1), (1, 1), (2, 1), (2, 2)]),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
)


@settings(max_examples=60)
@given(
    isa_name=st.sampled_from(RUNNABLE),
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 3),
    channels=st.integers(1, 21),
    size=st.tuples(st.integers(1, 9), st.integers(1, 19)),
    n=st.integers(1, 18),
    window=windows,
    form=st.sampled_from(FORMS),
    zx=st.sampled_from([0, 3, 128, 255]),
    zy=st.sampled_from([0, 5, 255]),
    residual=st.booleans(),
    clamp=st.sampled_from([(0, 255), (5, 255), (5, 77), (200, 220)]),
    output=st.sampled_from(["uint8", "uint8", "float32"]),
    after=st.tuples(st.integers(0, 2), st.integers(0, 2)),
)
def test_int8_equals_the_definition(
    isa_name, seed, batch, channels, size, n, window, form, zx, zy, residual, clamp, output, after
):
    assume(min(output_size(size, window, after)) > 0)
    assume(output_size(size, window, after) != (1, 1))
    clamp = (min(clamp[0], zy) if clamp[0] == 5 else clamp[0], clamp[1])
    check_int8(
        isa_name, seed, (batch, channels, *size), n, window, form,
        zx=zx, zy=zy, residual=residual, clamp=clamp, output=output, after=after,
    )  # fmt: skip


@pytest.mark.parametrize("isa_name", ALL_ISAS)
@pytest.mark.parametrize("form", FORMS)
def test_every_instruction_set_gives_the_same_integers(isa_name, form):
    """Sizes that no tile, vector or quad divides; several tiles of positions."""
    check_int8(isa_name, 1, (2, 22, 11, 27), 13, Window((3, 3), padding=(1, 1)), form, residual=True)


@pytest.mark.parametrize("isa_name", ALL_ISAS)
@pytest.mark.parametrize(("stored", "weight"), [(255, -128), (255, 127), (0, -128), (1, -1)])
def test_extremes_do_not_saturate(isa_name, stored, weight):
    """Four products of 255 and -128 leave int16, where ``vpmaddubsw`` would cut them off."""
    x = np.full((1, 64, 1, 20), stored, np.uint8)
    w = np.full((8, 64, 1, 1), weight, np.int8)
    for form in ("dense", "1x4"):
        check_int8(isa_name, 2, x.shape, 8, Window((1, 1)), form, x=x, weight=w, zx=0, output="float32")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("isa_name", ALL_ISAS[:1] + ALL_ISAS[-2:])
def test_a_weight_of_zeros_leaves_the_bias(isa_name, form):
    weight = np.zeros((6, 9, 3, 3), np.int8)
    check_int8(isa_name, 3, (1, 9, 5, 6), 6, Window((3, 3), padding=(1, 1)), form, weight=weight, zx=255)


@pytest.mark.parametrize(("channels", "n", "groups"), [(8, 8, 8), (12, 6, 3), (10, 10, 10), (6, 12, 6), (8, 4, 2)])
@pytest.mark.parametrize("form", ("1x4", "4x4", "dense"))
def test_groups_are_block_sparse_layers(channels, n, groups, form):
    isa_name = RUNNABLE[(channels + n) % len(RUNNABLE)]
    window = Window((3, 3), stride=(2, 2), padding=(1, 1))
    check_int8(isa_name, 4, (2, channels, 7, 8), n, window, form, groups=groups, density=1.0, zx=17)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(threads):
    check_int8(RUNNABLE[0], 5, (1, 64, 16, 40), 256, Window((1, 1)), "1x4", threads=threads, density=0.9)
    check_int8(RUNNABLE[0], 5, (1, 64, 15, 40), 64, Window((3, 3), padding=(1, 1)), "dense", threads=threads)


def test_ties_round_to_even():
    """Accumulators of odd numbers times one half lie exactly between two integers."""
    x = np.arange(256, dtype=np.uint8).reshape(1, 1, 4, 64)
    weight = np.ones((4, 1, 1, 1), np.int8)
    m = np.full(4, 0.5, np.float32)
    for isa_name in RUNNABLE:
        got, _ = convolve(isa_name, x, weight, Window((1, 1)), m=m, epilogue=Epilogue("uint8", None, 3))
        np.testing.assert_array_equal(got[0, 0].ravel(), np.rint(np.arange(256) / 2) + 3)


@settings(max_examples=25)
@given(
    isa_name=st.sampled_from(RUNNABLE),
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 2),
    channels=st.integers(1, 13),
    size=st.tuples(st.integers(1, 7), st.integers(2, 19)),
    n=st.integers(1, 10),
    window=windows,
    form=st.sampled_from(FORMS),
    residual=st.booleans(),
    clamp=st.sampled_from([(float("-inf"), float("inf")), (0.0, float("inf")), (0.0, 6.0), (0.5, 0.75)]),
)
def test_float_is_close_to_the_definition(isa_name, seed, batch, channels, size, n, window, form, residual, clamp):
    """Within rtol 1e-5 of sqrt(K) times the largest term: sums in another order."""
    assume(min(output_size(size, window)) > 0)
    assume(output_size(size, window) != (1, 1))
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, channels, *size)).astype(np.float32)
    density = weights(rng, (n, channels, *window.kernel), 0.5, form) != 0
    weight = (rng.standard_normal(density.shape) * density).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32)
    out = output_size(size, window)
    other = rng.standard_normal((batch, n, *out)).astype(np.float32) if residual else None
    epilogue = Epilogue("float32", Residual() if residual else None, 0, *clamp)
    got, margin = convolve(isa_name, x, weight, window, form=form, bias=bias, epilogue=epilogue, residual=other)
    want = conv_float(x, weight, window) + bias.reshape(1, -1, 1, 1) + (0 if other is None else other)
    want = np.clip(want, *clamp)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.sqrt(weight[0].size) * 3)
    assert (margin == 0).all()


# Metamorphic.


def layer(weight, form, isa_name=RUNNABLE[0], seed=8):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (1, weight.shape[1], 6, 9)).astype(np.uint8)
    m = np.full(len(weight), 1e-3, np.float32)
    return convolve(isa_name, x, weight, Window((3, 3), padding=(1, 1)), form=form, m=m,
                    epilogue=Epilogue("uint8", None, 100))[0]  # fmt: skip


def test_dense_and_sparse_agree_bit_for_bit():
    weight = weights(np.random.default_rng(9), (10, 14, 3, 3), 0.5, "1x4")
    dense, single, shared = (layer(weight, form) for form in FORMS)
    np.testing.assert_array_equal(single, dense)
    np.testing.assert_array_equal(shared, dense)


@pytest.mark.parametrize("form", FORMS)
def test_permuted_output_channels_permute_the_outputs(form):
    rng = np.random.default_rng(10)
    weight = weights(rng, (10, 12, 3, 3), 0.5, "1x4")
    order = rng.permutation(10)
    np.testing.assert_array_equal(layer(weight[order], form), layer(weight, form)[:, order])


@pytest.mark.parametrize("form", FORMS)
def test_an_all_zero_block_changes_nothing(form):
    """Four more input channels whose weights are zero, whatever they hold."""
    rng = np.random.default_rng(11)
    weight = weights(rng, (6, 8, 3, 3), 0.7, "1x4")
    x = rng.integers(0, 256, (1, 12, 5, 7)).astype(np.uint8)
    m = np.full(6, 1e-3, np.float32)
    wider = np.concatenate([weight, np.zeros((6, 4, 3, 3), np.int8)], axis=1)
    window = Window((3, 3), padding=(1, 1))
    epilogue = Epilogue("uint8", None, 100)
    narrow = convolve(RUNNABLE[0], x[:, :8], weight, window, form=form, m=m, epilogue=epilogue)[0]
    wide = convolve(RUNNABLE[0], x, wider, window, form=form, m=m, epilogue=epilogue)[0]
    np.testing.assert_array_equal(wide, narrow)
