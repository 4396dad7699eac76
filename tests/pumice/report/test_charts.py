import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pumice.report.charts import Axis, Bar, Dot, _share, _ticks, bar_chart, scatter_plot

numbers = st.floats(-1e9, 1e9, allow_nan=False).filter(lambda x: x == 0 or abs(x) > 1e-9)


def svg(markup):
    return ElementTree.fromstring(markup[markup.index("<svg") :])


def percent(text):
    return float(text.rstrip("%"))


def test_bars_are_as_long_as_their_numbers_and_parts_follow_each_other():
    rows = [Bar("a", "4", {"pruning": 3, "weights": 1}), Bar("b", "2", {"pruning": 0, "weights": 2})]
    drawn = [
        [(r.get("class"), percent(r.get("x")), percent(r.get("width"))) for r in group.iter("rect")]
        for group in svg(bar_chart(rows, "t")).iter("g")
    ]
    assert drawn == [
        [("kind-pruning", 0, 75), ("kind-weights", 75, 25)],
        [("kind-pruning", 0, 0), ("kind-weights", 0, 50)],
    ]


def test_bars_of_nothing_are_drawn():
    assert len(list(svg(bar_chart([Bar("a", "0", {"sparse": 0.0})], "t")).iter("rect"))) == 1


@given(st.lists(numbers, min_size=1, max_size=6), st.booleans())
def test_ticks_are_round_even_and_around_all_values(values, from_zero):
    ticks = _ticks(values, Axis("x", from_zero=from_zero))
    assert 2 <= len(ticks) <= 8
    slack = 1e-6 * (ticks[-1] - ticks[0])
    assert ticks[0] <= min(values) + slack
    assert ticks[-1] >= max(values) - slack
    if from_zero:
        assert ticks[0] <= 0 + slack
    step = ticks[1] - ticks[0]
    assert f"{step:.6e}"[0] in "125"
    assert ticks == pytest.approx([ticks[0] + index * step for index in range(len(ticks))])


def test_points_lie_where_the_ticks_say():
    dots = [Dot(10, 1, "a", "sparse"), Dot(30, 5, "b", "dense")]
    picture = svg(scatter_plot(dots, Axis("across"), Axis("up"), "t"))
    ticks = {t.text: t for t in picture.iter("text") if t.get("class", "").startswith("tick")}
    for circle, dot in zip(picture.iter("circle"), dots, strict=True):
        assert circle.get("cx") == ticks[f"{dot.x:g}"].get("x")
        assert circle.get("cy") == ticks[f"{dot.y:g}"].get("y")
        assert circle.find("title").text == dot.label
    up = {float(t.text): float(t.get("y")) for t in ticks.values() if "end" in t.get("class")}
    assert sorted(up.values(), reverse=True) == [up[key] for key in sorted(up)]  # more is higher


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6))
def test_logarithmic_ticks_are_around_all_values_and_powers_are_evenly_apart(values):
    axis = Axis("x", is_logarithmic=True)
    ticks = _ticks(values, axis)
    assert 2 <= len(ticks) <= 14
    assert ticks[0] <= min(values) * 1.001
    assert ticks[-1] >= max(values) * 0.999
    assert {f"{tick:.3e}"[0] for tick in ticks} <= set("125")
    shares = [_share(value, ticks, axis) for value in values]
    assert all(-1e-3 <= share <= 1.001 for share in shares)
    middle = (ticks[0] * ticks[-1]) ** 0.5
    assert _share(middle, ticks, axis) == pytest.approx(0.5)


def test_marks_do_not_cover_each_other():
    dots = [Dot(1, 1, "a", "sparse", mark="1"), Dot(1, 1, "b", "sparse", mark="2"), Dot(9, 9, "c", "sparse", mark="3")]
    picture = svg(scatter_plot(dots, Axis("across"), Axis("up"), "t"))
    assert [t.text for t in picture.iter("text") if t.get("class") == "middle"] == ["1", "3"]


def test_labels_are_short_and_tooltips_bounded():
    long = "encoder." * 2000 + "query"
    dots = [Dot(1, 1, long, "sparse")]
    bars = [Bar(long, "1", {"sparse": 1})]
    for picture in (bar_chart(bars, "t"), scatter_plot(dots, Axis("x"), Axis("y"), "t")):
        assert len(picture) < 4000
        assert "query" in picture
