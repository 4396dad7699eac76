"""Sparse or dense, and the reason that the report gives."""

import numpy as np
import pytest

from pumice.passes import choose_kernel
from pumice.passes.choose_kernel import Chooser, candidates, choose_slices
from pumice.passes.layer_kernel import LayerWork, Numbers
from pumice.schedules.blocks import Blocks, expand_groups
from pumice.schedules.costs import break_even, costs_of, estimate, price_of_entry
from pumice.schedules.epilogue import Epilogue, Residual
from pumice.schedules.geometry import Geometry, Window
from pumice.schedules.measurements import Machine, Measurement, Measurements
from pumice.schedules.places import Places
from pumice.schedules.slices import Slices
from pumice.schedules.tiling import DENSE, FORMS, Extent, Form, Tiling, tilings
from pumice.targets.isa import isa

ISAS = ("vnni512", "avx512bw", "avxvnni", "avx2", "portable")


def rows_with(zeros, n=64, taps=1, c=256, dtype=np.int8, seed=0):
    """Weights of which this share of the 1x4 blocks is zero."""
    rng = np.random.default_rng(seed)
    keep = np.repeat(rng.random((n, taps, c // 4)) >= zeros, 4, axis=2)
    return (rng.integers(1, 128, (n, taps, c)) * keep).astype(dtype)


def places_of(taps):
    """A map of 28 x 28, under a kernel of as many taps."""
    k = 3 if taps == 9 else 1
    geometry = Geometry(1, 28, 28, k // 2, k // 2)
    return Places(Window((k, k), padding=(k // 2, k // 2)), geometry, geometry)


def choose_blocks(rows, isa):
    return choose_kernel.choose_blocks(rows, places_of(rows.shape[1]), isa)


@pytest.mark.parametrize("name", ISAS)
def test_a_full_weight_runs_dense(name):
    choice = choose_blocks(rows_with(0.0), isa(name))
    assert choice.weight.is_dense and choice.kernel == f"dense int8 {name}"
    assert "zero" in choice.reason


@pytest.mark.parametrize("name", ISAS)
def test_ninety_percent_zeros_run_sparse(name):
    choice = choose_blocks(rows_with(0.9, taps=9), isa(name))
    assert not choice.weight.is_dense
    assert choice.kernel == f"sparse {choice.weight.shared}x4 int8 {name}"
    assert "90% of its 1x4 blocks are zero" in choice.reason and "breaks even at" in choice.reason


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("zeros", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_the_choice_is_the_cheapest_by_the_table(name, zeros):
    rows = rows_with(zeros)
    costs, choice = costs_of(name, "int8"), choose_blocks(rows, isa(name))
    extent = Extent.of(rows, places_of(1), isa(name))
    words = rows.reshape(64, 1, 64, 4).any(axis=3)
    times = {}
    for form in FORMS:
        lists = words.reshape(64 // form.shared, form.shared, -1)
        entries = lists[:, 0].size if form.is_dense else lists.any(axis=1).sum()
        for tiling in tilings(extent, form, isa(name), 1):
            times[form.describe(4), tiling] = estimate(extent, form, int(entries), tiling, costs)
    kernel, tiling = min(times, key=times.get)
    assert choice.kernel.startswith(kernel) and choice.tiling == tiling


@pytest.mark.parametrize("name", ISAS)
def test_sparse_is_chosen_on_one_side_of_the_break_even_only(name):
    limit = break_even(Extent.of(rows_with(0.0), places_of(1), isa(name)), isa(name), 1, costs_of(name, "int8"))
    assert 0.05 < limit < 0.95
    assert choose_blocks(rows_with(limit - 0.05), isa(name)).weight.is_dense
    assert not choose_blocks(rows_with(limit + 0.05), isa(name)).weight.is_dense


def test_a_layer_left_dense_says_where_sparse_would_pay():
    choice = choose_blocks(rows_with(0.2), isa("vnni512"))
    assert (
        choice.weight.is_dense
        and "breaks even at" in choice.reason
        and "% of its 1x4 blocks are zero: dense" in choice.reason
    )


def test_rows_that_share_their_blocks_take_the_shared_form():
    rows = np.repeat(rows_with(0.8, n=16), 4, axis=0)
    choice = choose_blocks(rows, isa("vnni512"))
    assert choice.weight.shared == 4 and "4x4" in choice.kernel and "4x4" in choice.reason


@pytest.mark.parametrize("dtype", [np.int8, np.float32])
def test_a_weight_of_zeros_keeps_nothing(dtype):
    rows = np.zeros((8, 9, 12), dtype)
    choice = choose_blocks(rows, isa("vnni512"))
    assert isinstance(choice.weight, Blocks) and choice.weight.work == 0 and choice.kernel.startswith("sparse")
    vector = choose_slices(rows[:, :1], isa("vnni512"))
    assert isinstance(vector.weight, Slices) and vector.weight.work == 0 and "sparse" in vector.kernel
    assert choice.reason and vector.reason


@pytest.mark.parametrize("name", ISAS)
def test_depthwise_layers_are_sparse(name):
    rows = expand_groups(rows_with(0.0, n=64, taps=9, c=4)[:, :, :1], 64)
    choice = choose_blocks(rows, isa(name))
    assert "sparse" in choice.kernel and choice.weight.work <= 64 * 9 * 4


@pytest.mark.parametrize("name", ISAS)
def test_one_row_streams_what_is_there(name):
    full, thin = (choose_slices(rows_with(zeros, c=1024), isa(name)) for zeros in (0.0, 0.97))
    assert full.weight.is_dense and full.kernel == f"gemv dense int8 {name}"
    assert not thin.weight.is_dense and thin.kernel == f"gemv sparse 1x4 int8 {name}"
    assert "padding included" in thin.reason


def test_float_blocks_are_single_weights():
    choice = choose_blocks(rows_with(0.9, dtype=np.float32), isa("avx2"))
    assert choice.kernel == "sparse 1x1 float32 avx2" and choice.weight.data.shape[2] == 1


def work_of(rows, epilogue=None, name="conv"):
    """A layer with these weights, on the map of ``places_of`` or on one position."""
    one = Geometry.of_tokens(1)
    places = Places(Window((1, 1)), one, one) if rows.shape[1] == 1 else places_of(rows.shape[1])
    n, c = len(rows), rows.shape[2]
    numbers = Numbers(rows, np.zeros(n, np.int32), np.ones(n, np.float32))
    return LayerWork(name, numbers, places, c // 4, epilogue or Epilogue(), 1)


def measured(work, times):
    """A database of one layer."""
    machine = Machine("a CPU", "vnni512", 1, "", "")
    return Measurements(machine, [Measurement(work.workload, *item) for item in times.items()])


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("taps", [1, 9])
def test_only_the_asked_forms_are_chosen(name, taps):
    for zeros in (0.0, 0.9):
        work = work_of(rows_with(zeros, taps=taps))
        assert Chooser((DENSE,)).choose(work, isa(name)).weight.is_dense
        assert not Chooser(FORMS[1:]).choose(work, isa(name)).weight.is_dense


def test_measured_times_outdo_the_table_and_are_in_the_reason():
    work = work_of(rows_with(0.9, taps=9))
    tiling = Tiling(3, 16, 32)
    times = {(DENSE, tiling): 1e6, (Form(1), tiling): 2e6, (Form(4), tiling): 3e6}
    choice = Chooser(measured=measured(work, times)).choose(work, isa("vnni512"))
    assert choice.weight.is_dense and choice.tiling == tiling and choice.kernel == "dense int8 vnni512"
    assert choice.reason.endswith("blocks are zero; measured here: dense 1 ms, sparse 1x4 2 ms, sparse 4x4 3 ms")
    times[Form(1), Tiling(5, 16, 64)] = 25_000
    choice = Chooser(measured=measured(work, times), where="on an old CPU").choose(work, isa("vnni512"))
    assert choice.kernel == "sparse 1x4 int8 vnni512" and choice.tiling == Tiling(5, 16, 64)
    assert "measured on an old CPU: sparse 1x4 25 us, dense 1 ms" in choice.reason
    assert choice.weight.tile_words == 16 and choice.weight.shared == 1


def test_measured_times_of_one_row():
    work = work_of(rows_with(0.97, c=1024))
    assert work.has_one_position
    choice = Chooser(measured=measured(work, {(DENSE, None): 1.0, (Form(1), None): 2.0})).choose(work, isa("vnni512"))
    assert choice.weight.is_dense and choice.kernel == "gemv dense int8 vnni512" and "measured here" in choice.reason


def test_times_of_another_layer_or_without_a_dense_one_are_not_used():
    work, other = work_of(rows_with(0.9, taps=9)), work_of(rows_with(0.5, taps=9))
    times = {(DENSE, Tiling(3, 16, 32)): 1.0, (Form(1), Tiling(3, 16, 32)): 2.0}
    assert "cost table" in Chooser(measured=measured(other, times)).choose(work, isa("vnni512")).reason
    del times[DENSE, Tiling(3, 16, 32)]
    assert "cost table" in Chooser(measured=measured(work, times)).choose(work, isa("vnni512")).reason


def test_names_and_scales_do_not_make_another_workload_and_what_takes_time_does():
    rows = rows_with(0.9, taps=9)
    plain = work_of(rows).workload
    assert work_of(rows, Epilogue(zero_point=3, low=3, scale=0.5, fits=True), "other").workload == plain
    for epilogue in (Epilogue(residual=Residual()), Epilogue("float32"), Epilogue(activation="gelu")):
        assert not work_of(rows, epilogue).workload.resembles(plain)
    assert work_of(rows_with(0.9, taps=9, seed=1)).workload.resembles(plain)
    assert not work_of(rows_with(0.8, taps=9)).workload.resembles(plain)


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("zeros", [0.0, 0.9])
def test_candidates_are_few_and_hold_the_choice_and_dense(name, zeros):
    work = work_of(rows_with(zeros, taps=9))
    found = candidates(work, isa(name))
    assert 4 <= len(found) <= 16 and len(set(found)) == len(found)
    assert any(form.is_dense for form, _ in found)
    default = Chooser().choose(work, isa(name))
    assert (default.weight.is_dense, default.tiling) in {(form.is_dense, tiling) for form, tiling in found}


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("words", [16, 1024])
def test_the_wide_space_holds_the_narrow_one(name, words):
    extent = Extent.of(np.zeros((64, 9, 4 * words), np.int8), places_of(9), isa(name))
    for form in FORMS:
        wide = tilings(extent, form, isa(name), 2, wide=True)
        assert {(t.vectors, t.words) for t in tilings(extent, form, isa(name), 2)} <= {
            (t.vectors, t.words) for t in wide
        }
        assert all(t.vectors * form.shared < isa(name).registers and t.rows % 4 == 0 for t in wide)


def few_positions(count, rows):
    """A linear layer with ``count`` rows of input."""
    tokens = Geometry.of_tokens(count)
    numbers = Numbers(rows, np.zeros(len(rows), np.int32), np.ones(len(rows), np.float32))
    return LayerWork("fc", numbers, Places(Window((1, 1)), tokens, tokens), rows.shape[2] // 4, Epilogue(), 1)


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("zeros", [0.0, 0.95])
def test_few_rows_are_in_slices_where_these_cost_less(name, zeros):
    rows = rows_with(zeros, n=256, c=1024)
    for count in (1, 2, 8):
        work, costs = few_positions(count, rows), costs_of(name, "int8")
        choice = Chooser().choose(work, isa(name))
        blocks = choose_kernel.choose_blocks(rows, work.places, isa(name))
        slices = choose_slices(rows, isa(name), positions=count)
        extent = Extent.of(rows, work.places, isa(name))
        form = Form(blocks.weight.shared, blocks.weight.is_dense)
        block_time = estimate(
            extent, form, len(blocks.weight.data) if not form.is_dense else 64 * 256, blocks.tiling, costs
        )
        slice_time = slices.weight.work * price_of_entry(slices.weight.is_dense, count, costs)
        assert isinstance(choice.weight, Slices) == (count == 1 or slice_time < block_time)
        assert choice.kernel == (slices if isinstance(choice.weight, Slices) else blocks).kernel
    assert isinstance(Chooser().choose(few_positions(2, rows), isa(name)).weight, Slices)


def test_measured_times_of_few_rows():
    work = few_positions(3, rows_with(0.9, c=1024))
    found = candidates(work, isa("vnni512"))
    assert found[:2] == [(DENSE, None), (Form(1), None)] and len(found) > 4 and all(tiling for _, tiling in found[2:])
    for best in (found[0], found[1], found[-1]):
        times = {candidate: 1.0 if candidate == best else 2.0 for candidate in found}
        choice = Chooser(measured=measured(work, times)).choose(work, isa("vnni512"))
        assert (choice.tiling, choice.weight.is_dense) == (best[1], best[0].is_dense)
        assert choice.kernel.startswith("gemv") == (best[1] is None)


def test_a_map_whose_taps_are_pixels_of_their_own_is_not_in_slices():
    """A kernel of 2 x 2 with stride 2 on 2 x 2 pixels: one position, and four stride phases."""
    one = Geometry.of_tokens(1)
    places = Places(Window((2, 2), (2, 2)), one, one)
    assert not isinstance(choose_kernel.choose_form(rows_with(0.0, taps=4), places, isa("vnni512")).weight, Slices)
