"""The user's own measure of a model: a function in a script of theirs, run because they name it.

    def accuracy(run):                                   # metric.py
        logits = [run({"image": image[None]})["logits"] for image in images]
        return np.mean(np.argmax(logits, -1).ravel() == labels)

``load_metric("metric.py:accuracy")`` loads it. Every engine is measured alike: it is handed over as ``run``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from pumice.errors import PumiceError, UsageError

# One inference: arrays by input name -> arrays by output name.
Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Metric:
    """A function that takes an engine and says how good it is; higher is better."""

    script: Path
    name: str  # of the function
    function: Callable[[Run], Any]

    def __call__(self, run: Run) -> dict[str, float]:
        """Measure one engine: finite numbers by name, in the function's order; a single one has the function's name.

        Raises UsageError where the function raises or returns anything else than a number or a dict of numbers, and
        lets through what Pumice itself raises in ``run``.
        """
        with _as_usage_error(self.script, f"'{self.name}'"):
            returned = self.function(run)
        values = returned if isinstance(returned, Mapping) else {self.name: returned}
        if not values:
            raise UsageError(f"{self}: returned no number; return at least one, higher being better")
        return {str(name): self._number(name, value) for name, value in values.items()}

    def __str__(self) -> str:
        return f"{self.script}:{self.name}"

    def _number(self, name: object, value: Any) -> float:
        try:
            number = math.nan if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # torch raises the last
            number = math.nan
        if not math.isfinite(number):
            what = "" if name == self.name else f" for '{name}'"
            found = f"{value!s:.60}" if isinstance(value, float | np.floating) else f"a {type(value).__name__}"
            raise UsageError(f"{self}: returned {found}{what}; return a finite number, or a dict of numbers by name")
        return number


def load_metric(spec: str) -> Metric:
    """``"script.py:function"`` -> the function, ready to measure. The script runs, its folder open to its imports.

    Raises UsageError where there is no such file or function, and where the script raises.
    """
    path, _, name = spec.rpartition(":")
    script = Path(path)
    if not path or not name.isidentifier():
        raise UsageError(f"{spec}: does not name a function; give SCRIPT.py:FUNCTION, such as metric.py:accuracy")
    if not script.is_file():
        raise UsageError(f"{script}: there is no such file; give SCRIPT.py:FUNCTION, such as metric.py:accuracy")
    module = ModuleType(f"pumice_metric_{script.stem}")
    module.__file__ = str(script.absolute())  # as an import would have it
    sys.modules[module.__name__] = module  # dataclasses and pickle look their own module up
    with _as_usage_error(script, "the script"):  # not by an import, which would leave a cache beside the script
        exec(compile(script.read_bytes(), script, "exec"), vars(module))
    function = getattr(module, name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if _defined_in(value, module.__name__)]
        there = ", ".join(functions) or "none"
        raise UsageError(f"{script}: has no function '{name}' (it defines: {there}); give SCRIPT.py:FUNCTION")
    return Metric(script, name, function)


@contextmanager
def _as_usage_error(script: Path, what: str) -> Iterator[None]:
    """What the user's code raises, with the line of their script, as one sentence; imports beside the script work."""
    folder = str(script.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    except PumiceError:
        raise
    except (Exception, SystemExit) as error:  # their code may raise anything
        lines = str(error).strip().splitlines()
        raised = f"{type(error).__name__}{': ' if lines else ''}{lines[0] if lines else ''}"
        raise UsageError(f"{script}: {what} raised {raised}{_where(error, script)}; correct it there") from error
    finally:
        if folder in sys.path:  # their code may have changed it
            sys.path.remove(folder)


def _where(error: BaseException, script: Path) -> str:
    """The deepest line of the script that the error passed through."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename) == script:
            line = trace.tb_lineno
        trace = trace.tb_next
    if isinstance(error, SyntaxError):
        line = error.lineno
    return "" if line is None else f" (line {line})"


def _defined_in(value: Any, module: str) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module
