"""The dynamic programme against all choices tried out, the search around it, and the way back."""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pumice.advisor.allocation import Problem, allocate, reversals, search_sensitivities


@st.composite
def problems(draw, numbers):
    layers = draw(st.integers(1, 4))
    options = [draw(st.integers(1, 4)) for _ in range(layers)]
    costs = [np.array([draw(numbers) for _ in range(count)], float) for count in options]
    errors = [np.array([draw(numbers) for _ in range(count)], float) for count in options]
    return Problem(costs, errors)


def all_choices(problem):
    return product(*(range(len(cost)) for cost in problem.costs))


def least_error(problem, budget):
    """By brute force; None where nothing fits."""
    return min((problem.error(c) for c in all_choices(problem) if problem.cost(c) <= budget), default=None)


@given(problems(st.integers(0, 20)), st.integers(0, 60))
@settings(max_examples=200, deadline=None)
def test_whole_costs_are_allocated_as_brute_force_does(problem, budget):
    spare = budget - int(problem.least)
    choice = allocate(problem, budget, buckets=max(spare, 1))  # a bucket is one
    expected = least_error(problem, budget)
    if expected is None:
        assert choice is None
    else:
        assert problem.cost(choice) <= budget
        assert problem.error(choice) == expected


@given(problems(st.floats(0, 1e6)), st.floats(0, 4e6), st.sampled_from([7, 100, 10_000]))
@settings(max_examples=200, deadline=None)
def test_any_cost_is_rounded_against_the_choice(problem, budget, buckets):
    choice = allocate(problem, budget, buckets)
    if choice is None:
        assert least_error(problem, budget * (1 - 1e-12)) is None
        return
    assert problem.cost(choice) <= budget * (1 + 1e-12)
    spare = budget - problem.least
    lost = len(problem.costs) * spare / buckets
    with_less = least_error(problem, budget - lost * (1 + 1e-9))
    if with_less is not None:
        assert problem.error(choice) <= with_less * (1 + 1e-9)


def test_the_cheapest_choice_is_found_where_nothing_else_fits():
    problem = Problem([np.array([0.1, 0.3]), np.array([0.2, 0.7])], [np.array([1.0, 0.0])] * 2)
    assert allocate(problem, problem.least) == (0, 0)
    assert allocate(problem, problem.least * 0.999) is None


def test_of_equal_errors_the_cheaper_is_taken():
    assert allocate(Problem([np.array([3.0, 1.0, 2.0])], [np.zeros(3)]), 10.0) == (1,)


def hidden_problem():
    """Six layers that look alike, two of which the network does not forgive."""
    costs = [np.array([1.0, 2.0, 4.0])] * 6
    errors = [np.array([0.4, 0.1, 0.0])] * 6
    truth = np.array([1.0, 1.0, 30.0, 1.0, 30.0, 1.0])
    return Problem(costs, errors), truth


def test_the_search_finds_which_layers_are_sensitive():
    problem, truth = hidden_problem()
    real = problem.weighted(truth).error
    found = search_sensitivities(problem, 12.0, real, trials=80)
    best = min(real(choice) for choice in all_choices(problem) if problem.cost(choice) <= 12.0)
    plain = real(allocate(problem, 12.0))
    assert found.score == real(found.choice) < plain
    assert found.score <= best + 0.25 * (plain - best)
    assert problem.cost(found.choice) <= 12.0
    assert found.trials <= 80
    assert found.scores == sorted(found.scores, reverse=True)
    assert allocate(problem.weighted(found.sensitivities), 12.0) == found.choice


def test_known_sensitivities_are_where_it_starts():
    problem, truth = hidden_problem()
    found = search_sensitivities(problem, 12.0, problem.weighted(truth).error, trials=1, start=truth)
    assert found.trials == 1
    assert found.choice == allocate(problem.weighted(truth), 12.0)


def test_the_search_repeats_itself_and_scores_nothing_twice():
    problem, truth = hidden_problem()
    asked = []

    def score(choice):
        asked.append(choice)
        return problem.weighted(truth).error(choice)

    first = search_sensitivities(problem, 12.0, score, trials=20, seed=3)
    assert len(asked) == len(set(asked)) == first.trials
    again = search_sensitivities(problem, 12.0, problem.weighted(truth).error, trials=20, seed=3)
    assert again.choice == first.choice
    np.testing.assert_array_equal(again.sensitivities, first.sensitivities)


def test_the_search_stops_when_it_is_told():
    problem, _ = hidden_problem()
    assert search_sensitivities(problem, 12.0, problem.error, trials=50, may_go_on=lambda: False).trials == 1


def test_no_choice_within_the_budget_is_an_error():
    problem, _ = hidden_problem()
    with pytest.raises(ValueError, match=r"costs 6\.0, more than 5"):
        search_sensitivities(problem, 5, problem.error, trials=2)


def test_layers_are_reverted_by_what_they_harm_for_what_they_save():
    problem = Problem(
        [np.array([1.0, 2.0, 8.0]), np.array([1.0, 5.0])],
        [np.array([0.5, 0.1, 0.0]), np.array([0.8, 0.0])],
    )
    # 0.4 for 1, then 0.8 for 4, then 0.1 for 6
    assert list(reversals(problem, (0, 0))) == [(0, 0), (1, 0), (1, 1), (2, 1)]


@given(problems(st.integers(0, 20)))
@settings(max_examples=100, deadline=None)
def test_reverting_ends_at_the_least_error(problem):
    start = allocate(problem, problem.least)
    path = list(reversals(problem, start))
    errors = [problem.error(choice) for choice in path]
    assert path[0] == start
    assert all(after < before for before, after in pairwise(errors))
    assert errors[-1] == sum(error.min() for error in problem.errors)
