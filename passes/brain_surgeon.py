"""Pruning and rounding one layer's weights so that those left make up for what is lost: optimal brain surgeon.

Everything here is linear algebra on one matrix ``[N, K]`` (output channels by what they read) and the second moments
``G [K, K]`` of its input: what is minimised is ``trace((W - V) G (W - V)^T)``, the mean squared error of the output.
Where a column comes to its end (pruned, or rounded), the columns behind it take over its error as well as they can:
with ``U`` the upper Cholesky factor of ``inverse(G)``, that is ``w[j+1:] -= (w[j] - v[j]) / U[j, j] * U[j, j+1:]``.

Sources: Hassibi and Stork, 1993; Frantar and Alistarh, SparseGPT (arXiv:2301.00774); Frantar et al., GPTQ
(arXiv:2210.17323); Boza, Fast and Effective Weight Update for Pruned Large Language Models (arXiv:2401.02938).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

# Columns whose end is made up for at once: the paper's block of 128, a multiple of every unit's width.
_COLUMNS = 128
# Which weights of some columns are to be zero, bool [N, columns]: by their values, U of them, and the units among them.
Pick = Callable[[np.ndarray, np.ndarray, list[slice]], np.ndarray]

_RHO = 1.0  # of the alternating directions: inputs are scaled to a mean square of 1 before


def damped(gram: np.ndarray, share: float) -> np.ndarray:
    """``G`` plus ``share`` of its mean diagonal: it can be inverted, and weights stay where samples say nothing."""
    mean = float(np.mean(np.diagonal(gram)))
    return gram + share * (mean if mean > 0 else 1.0) * np.eye(len(gram))


def inverse_factor(gram: np.ndarray) -> np.ndarray:
    """``U``, upper triangular with ``U^T U = inverse(G)``: row j holds how the columns behind j make up for it.

    ``U[j:, j:]`` is the factor of the inverse of ``G[j:, j:]``: what is left once the columns before j are fixed.
    """
    # With the order reversed a lower factor of G turns into the upper one of its inverse.
    lower = np.linalg.cholesky(gram[::-1, ::-1])
    return np.triu(np.linalg.inv(lower)[::-1, ::-1])


def sparsegpt(weight: np.ndarray, gram: np.ndarray, units: Sequence[slice], pick: Pick) -> np.ndarray:
    """SparseGPT: one pass over the columns that chooses zeros and makes up for them; float64 ``[N, K]``.

    ``units`` are the runs of columns that are not to be torn apart: blocks, or groups of N:M.
    """
    weight = weight.astype(np.float64)
    factor = inverse_factor(gram)
    for chunk in _chunks(units):
        first, last = chunk[0].start, chunk[-1].stop
        here = slice(first, last)
        shifted = [slice(unit.start - first, unit.stop - first) for unit in chunk]
        left = ~pick(weight[:, here], factor[here, here], shifted)
        _fix_columns(weight, factor, first, last, partial(_masked, left, first))
    return weight


def losses(weight: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """``[N]``: what each row's output loses when these columns become zero and the ones behind make up for it.

    ``factor`` is the columns' part of ``U``: with ``B`` the columns, ``w_B^T inverse(inverse(G[j:, j:])_BB) w_B`` is
    ``|U_BB^-T w_B|^2``.
    """
    return np.asarray(np.square(np.linalg.solve(factor.T, weight.T)).sum(0))


def round_columns(weight: np.ndarray, gram: np.ndarray, scale: np.ndarray, limit: int = 127) -> np.ndarray:
    """GPTQ: ``weight [N, K]`` as multiples of ``scale [N]`` in ``[-limit, limit]``; zeros stay zero. int8 ``[N, K]``.

    Columns with the largest inputs are rounded first ("act-order"), while the most others can make up for it.
    """
    order = np.argsort(-np.diagonal(gram), kind="stable")
    moved, zero = weight[:, order].astype(np.float64), weight[:, order] == 0
    factor = inverse_factor(gram[np.ix_(order, order)])
    steps = np.zeros(moved.shape, np.int8)

    def fix(j: int, column: np.ndarray) -> np.ndarray:
        steps[:, j] = np.where(zero[:, j], 0, np.clip(np.rint(column / scale), -limit, limit))
        fixed: np.ndarray = steps[:, j] * scale
        return fixed

    for first in range(0, moved.shape[1], _COLUMNS):
        _fix_columns(moved, factor, first, min(first + _COLUMNS, moved.shape[1]), fix)
    result = np.empty_like(steps)
    result[:, order] = steps
    return result


def alternate(
    weight: np.ndarray, gram: np.ndarray, project: Callable[[np.ndarray, float], np.ndarray], rounds: int
) -> np.ndarray:
    """Choose zeros by alternating directions (ADMM): the zeros, bool ``[N, K]``.

    ``project(scores [N, K], progress)`` says which weights are to be zero by their scores; ``progress`` rises to 1,
    so that zeros may come in step by step (as in the paper, by a cubic schedule).
    """
    size = np.sqrt(np.maximum(np.diagonal(gram), 1e-12))
    scaled, target = gram / size / size[:, None], weight * size
    solver = np.linalg.inv(scaled + _RHO * np.eye(len(scaled)))
    wanted = target @ scaled
    dual, current = np.zeros_like(target), target
    zero = np.zeros(target.shape, bool)
    for number in range(1, rounds + 1):
        zero = project(np.square(current + dual), number / rounds)
        sparse = np.where(zero, 0, current + dual)
        dual = dual + current - sparse
        current = (wanted + _RHO * (sparse - dual)) @ solver
    return project(np.square(current + dual), 1.0) if rounds else zero


def refit(weight: np.ndarray, gram: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """The least squares weights for these zeros: ``argmin_V trace((W - V) G (W - V)^T)``, V zero where ``zero``.

    Of each row only what is left is solved for; rows with the same zeros are solved together. As the gradient of what
    is left is zero then, any later change of it costs exactly ``trace(D G D^T)`` more: pruning with a refit and then
    rounding with ``round_columns`` is rounding jointly with pruning.
    """
    result = np.zeros(weight.shape)
    wanted = weight.astype(np.float64) @ gram
    for rows in _alike(zero):
        left = np.flatnonzero(~zero[rows[0]])
        if left.size:
            solved = np.linalg.solve(gram[np.ix_(left, left)], wanted[np.ix_(rows, left)].T).T
            result[np.ix_(rows, left)] = solved
    return result


def _alike(zero: np.ndarray) -> list[np.ndarray]:
    """The rows that have the same zeros, together."""
    packed = np.packbits(zero, axis=1)
    _, inverse = np.unique(packed, axis=0, return_inverse=True)
    order = np.argsort(inverse.ravel(), kind="stable")
    return np.split(order, np.flatnonzero(np.diff(inverse.ravel()[order])) + 1)


def _masked(left: np.ndarray, first: int, j: int, column: np.ndarray) -> np.ndarray:
    """Column ``j`` as it is where it stays; ``left`` begins with the column ``first``."""
    kept: np.ndarray = column * left[:, j - first]
    return kept


def _fix_columns(
    weight: np.ndarray, factor: np.ndarray, first: int, last: int, fix: Callable[[int, np.ndarray], np.ndarray]
) -> None:
    """Give the columns from ``first`` to ``last`` their final values, and their errors to the ones behind."""
    errors = np.empty((len(weight), last - first))
    for j in range(first, last):
        fixed = fix(j, weight[:, j])
        errors[:, j - first] = (weight[:, j] - fixed) / factor[j, j]
        weight[:, j] = fixed
        weight[:, j + 1 : last] -= np.outer(errors[:, j - first], factor[j, j + 1 : last])
    weight[:, last:] -= errors @ factor[first:last, last:]


def _chunks(units: Sequence[slice]) -> Iterator[list[slice]]:
    """The units in runs of about so many columns."""
    chunk: list[slice] = []
    for unit in units:
        if chunk and unit.stop - chunk[0].start > _COLUMNS:
            yield chunk
            chunk = []
        chunk.append(unit)
    if chunk:
        yield chunk
