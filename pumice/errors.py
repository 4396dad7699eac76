"""Every error that Pumice raises on purpose: one hierarchy, one exit code a kind.

A message says what was wrong, where (file, layer, node), why, and what to do about it, in one sentence.
"""


class PumiceError(Exception):
    """Base of all; ``exit_code`` is what the command returns."""

    exit_code = 1


class UsageError(PumiceError):
    """The call itself is wrong: an option, an input's name, a missing shape."""

    exit_code = 2


class ModelError(PumiceError):
    """The model, its weights, its masks or its calibration data cannot be used as they are."""

    exit_code = 3


class UnsupportedError(PumiceError):
    """A legal model that Pumice cannot compile right: an operator, a data type, a target."""

    exit_code = 4


class MissingDependencyError(PumiceError):
    """A tool or package is needed that is not installed; the message names it and how to install it."""

    exit_code = 5


class AccuracyBudgetError(PumiceError):
    """The compiled model misses the accuracy that was asked for."""

    exit_code = 6


class PerformanceBudgetError(PumiceError):
    """The compiled model misses the speed that was asked for."""

    exit_code = 7
