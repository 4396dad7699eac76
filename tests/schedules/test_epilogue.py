"""From accumulators to stored values: exactly the definition, on every instruction set, packed or not."""

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import ALL_ISAS, RUNNABLE, garbage, run_kernel

from pumice.schedules import emit
from pumice.schedules.epilogue import (
    Epilogue,
    Residual,
    centred_residual,
    finish,
    pack_pair,
    pack_words,
    round_unsaturated,
)
from pumice.schedules.functions import ACTIVATIONS
from pumice.targets.isa import isa

POSITIONS = 208


def run(isa_name, acc, scale, epilogue, residual=None, saturates_late=False):
    """The epilogue of four rows ``[4, POSITIONS]``: words of bytes, or float32."""
    lanes, packed = isa(isa_name).lanes, epilogue.output == "uint8"
    make, by = (round_unsaturated, isa(isa_name)) if saturates_late else (finish, lanes)

    def body():
        shape = (4 * POSITIONS,)
        other = {} if residual is None else {"r": (shape, "int32" if packed else "float32")}
        out = ((POSITIONS, 4), "uint8") if packed else (shape, "float32")
        buffers = emit.arguments(acc=(shape, "int32"), scale=((4,), "float32"), **other, y=out)

        def one(row, at):
            r = None if residual is None else emit.load(buffers[2], row * POSITIONS + at, lanes)
            if r is not None and packed:
                r = centred_residual(r, epilogue, lanes)
            factor = emit.splat(buffers[1][row], lanes)
            return make(emit.load(buffers[0], row * POSITIONS + at, lanes), factor, r, epilogue, by)

        def late(values):
            pairs = [pack_pair(*values[i : i + 2], epilogue, isa(isa_name)) for i in (0, 2)]
            return pack_words(*pairs, epilogue, isa(isa_name))

        with emit.loop(POSITIONS // lanes) as i:
            values = [one(row, i * lanes) for row in range(4)]
            if packed:
                plain = emit.pack_bytes(values, lanes)
                word = late(values) if saturates_late else emit.turn(plain, isa(isa_name), lanes)
                emit.store(buffers[-1], i * lanes, word, lanes)
            else:
                for row, value in enumerate(values):
                    emit.store(buffers[-1], row * POSITIONS + i * lanes, value, lanes)

    given = [acc.astype(np.int32).ravel(), scale, *([] if residual is None else [residual.ravel()])]
    y = garbage((POSITIONS, 4), "uint8") if packed else garbage((4 * POSITIONS,), "float32")
    got = run_kernel(emit.kernel("k", body), isa_name, *given, y)
    return got.T if packed else got.reshape(4, POSITIONS)


def accumulators(rng, reach):
    acc = (rng.standard_normal((4, POSITIONS)) * reach).astype(np.int64)
    acc[:, :4] = [-(2**31), 2**31 - 1, 0, 1]
    return acc.astype(np.int32)


@pytest.mark.parametrize("isa_name", ALL_ISAS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_activations_give_the_same_integers_everywhere(isa_name, activation, with_residual):
    rng = np.random.default_rng(1)
    acc, m = accumulators(rng, 3000), (rng.random(4) * 2e-3).astype(np.float32)
    r = rng.integers(0, 256, acc.shape) if with_residual else None
    sy, zy, mr = 0.013, 40, float(np.float32(0.011))
    spec = Residual(mr, 99) if with_residual else None
    scale = float(np.float32(1 / sy))
    epilogue = Epilogue("uint8", spec, zy, 0, 255, activation, scale)
    other = None if r is None else reference.Residual(r, 99, mr)
    want = reference.requantize(acc, m[:, None], zy, other, activation=activation, sy=sy)
    late = run(isa_name, acc, m, epilogue, None if r is None else r.astype(np.int32), saturates_late=True)
    early = run(isa_name, acc, m, epilogue, None if r is None else r.astype(np.int32))
    np.testing.assert_array_equal(early, want)
    np.testing.assert_array_equal(late, want)


@settings(max_examples=40)
@given(
    st.sampled_from(RUNNABLE), st.integers(0, 10**6), st.sampled_from([0, 1, 128, 255]),
    st.sampled_from([(0, 255), (0, 200), (40, 255), (128, 140)]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_saturating_late_changes_nothing(isa_name, seed, zero_point, clamp, fits, with_residual):
    rng = np.random.default_rng(seed)
    acc, m = accumulators(rng, 3e5), (rng.random(4) * (0.4 if fits else 7.0)).astype(np.float32)
    r = rng.integers(0, 256, acc.shape) if with_residual else None
    spec = Residual(0.75, 20) if with_residual else None
    epilogue = Epilogue("uint8", spec, zero_point, *clamp, fits=fits)
    other = None if r is None else reference.Residual(r, 20, 0.75)
    want = reference.requantize(acc, m[:, None], zero_point, other, *clamp)
    r = None if r is None else r.astype(np.int32)
    np.testing.assert_array_equal(run(isa_name, acc, m, epilogue, r, saturates_late=True), want)
    np.testing.assert_array_equal(run(isa_name, acc, m, epilogue, r), want)


@pytest.mark.parametrize("isa_name", ALL_ISAS)
def test_float_outputs_with_a_float_residual(isa_name):
    rng = np.random.default_rng(3)
    acc, m = accumulators(rng, 3000), (rng.random(4) * 2e-3).astype(np.float32)
    residual = rng.standard_normal(acc.shape).astype(np.float32)
    epilogue = Epilogue("float32", Residual(), 0, -np.inf, np.inf)
    got = run(isa_name, acc, m, epilogue, residual)
    np.testing.assert_array_equal(got, reference.layer_float32(acc, m[:, None], residual))
    gelu = Epilogue("float32", Residual(), 0, 0.0, 1.5, "nn.gelu")
    want = np.clip(reference.gelu32(reference.layer_float32(acc, m[:, None], residual)), 0, np.float32(1.5))
    np.testing.assert_array_equal(run(isa_name, acc, m, gelu, residual), want)
