from dataclasses import replace

from html_page import Page
from hypothesis import given
from hypothesis import strategies as st

from pumice.report.data import Point
from pumice.report.page import format_page
from pumice.report.points import frontier, places_of

small = st.integers(0, 5)
POINTS = [
    Point("dense", 4.0, 900, 0.0, 0.9),
    Point("pruned", 2.0, 300, 0.1, 0.8, chosen=True),
    Point("poor", 3.0, 500, 0.2, 0.7),
]


@given(st.lists(st.tuples(small, small), max_size=12), st.booleans())
def test_the_frontier_is_what_nothing_else_beats(pairs, by_metric):
    scores = [{"metric": float(q)} if by_metric else {"error": -float(q)} for _, q in pairs]
    points = [Point("p", float(t), **score) for (t, _), score in zip(pairs, scores, strict=True)]

    def beaten(time, quality):
        return any(t <= time and q >= quality and (t, q) != (time, quality) for t, q in pairs)

    expected = sorted({pair for pair in pairs if not beaten(*pair)})
    assert [(place.milliseconds, place.quality) for place in frontier(places_of(points))] == expected


def test_points_are_listed_and_drawn(bare):
    page = Page(format_page(replace(bare, points=POINTS), "c"))
    expected = ("dense", "pruned", "(chosen)", "900 B", "0.9", "metric: higher is better")
    assert [word for word in expected if word not in page.text] == []
    errors = sum(layer.snr_db is not None for layer in bare.layers)
    assert len(page.all("circle")) == len(POINTS) + errors


def test_without_a_metric_the_error_is_drawn_and_without_both_it_is_said(bare):
    errors = [replace(point, metric=None) for point in POINTS]
    assert "error (noise over signal): lower is better" in Page(format_page(replace(bare, points=errors), "c")).text
    nothing = [replace(point, metric=None, error=None) for point in POINTS]
    page = Page(format_page(replace(bare, points=nothing), "c"))
    assert "No point has both a time and a metric or an error" in page.text


def test_a_point_of_unknown_time_is_listed_and_not_drawn(bare):
    unknown = Point("somewhere else", None, 700, 0.1, 0.99)
    page = Page(format_page(replace(bare, points=[*POINTS, unknown]), "c"))
    assert "somewhere else" in page.text
    assert len(places_of([*POINTS, unknown])) == len(POINTS)


def test_without_points_it_is_said_how_to_get_them(bare):
    assert "pumice advise" in Page(format_page(bare, "c")).text
