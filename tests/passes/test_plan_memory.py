"""The memory plan: what lives at once never overlaps, and no more is taken than a naive plan would."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pumice.passes.plan_memory import Lifetime, plan_memory
from pumice.targets.plan import ALIGNMENT, align


@st.composite
def lifetimes(draw):
    first = draw(st.integers(0, 20))
    return Lifetime(draw(st.integers(0, 5000)), first, first + draw(st.integers(0, 8)))


@settings(deadline=None)
@given(values=st.lists(lifetimes(), max_size=25))
def test_a_byte_belongs_to_one_living_value(values):
    placement = plan_memory(values)
    for step in range(30):
        owner: dict[int, int] = {}
        for i, (value, offset) in enumerate(zip(values, placement.offsets, strict=True)):
            assert offset % ALIGNMENT == 0 and offset + value.size <= placement.size
            if value.first <= step <= value.last:
                for line in range(offset // ALIGNMENT, (offset + align(value.size)) // ALIGNMENT):
                    assert owner.setdefault(line, i) == i


@settings(deadline=None)
@given(values=st.lists(lifetimes(), max_size=25))
def test_the_workspace_is_between_the_peak_and_the_sum(values):
    alive = [sum(align(v.size) for v in values if v.first <= step <= v.last) for step in range(30)]
    assert max(alive) <= plan_memory(values).size <= sum(align(v.size) for v in values)


def test_a_chain_needs_two_buffers_however_long():
    chain = [Lifetime(1000, i, i + 1) for i in range(10)]
    assert plan_memory(chain).size == 2 * align(1000)


def test_the_smallest_gap_that_fits_is_taken():
    long, short = (0, 9), (0, 0)
    values = [(1280, long), (640, short), (576, long), (320, short), (256, long), (192, (1, 9))]
    placement = plan_memory([Lifetime(size, *steps) for size, steps in values])
    assert placement.offsets == (0, 1280, 1920, 2496, 2816, 2496)


def test_nothing_takes_nothing():
    assert plan_memory([]).size == 0
