"""Every error that Pumice raises on purpose: one hierarchy, one exit code a kind.

A message says what was wrong, where (file, layer, node), why, and what to do about it, in one sentence. What running a
library may raise is defined in ``pumice.loader``, which has to stand alone.
"""

from pumice.loader import (
    DifferenceError,
    MissingDependencyError,
    ModelError,
    PumiceError,
    UnsupportedError,
    UsageError,
)

__all__ = [
    "AccuracyBudgetError",
    "DifferenceError",
    "MissingDependencyError",
    "ModelError",
    "PerformanceBudgetError",
    "PumiceError",
    "UnsupportedError",
    "UsageError",
]


class AccuracyBudgetError(PumiceError):
    """The compiled model misses the accuracy that was asked for."""

    exit_code = 6


class PerformanceBudgetError(PumiceError):
    """The compiled model misses the speed that was asked for."""

    exit_code = 7
