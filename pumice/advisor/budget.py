"""What a user allows a model to take, as text: ``8ms``, ``2MB``, ``60%``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pumice.errors import UsageError

_UNITS = {
    "latency": {"s": 1e9, "ms": 1e6, "us": 1e3},
    "size": {"B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9},
    "max-drop": {"": 1.0},
}
_EXAMPLES = {
    "latency": "8ms, 800us, or 60% of what dense int8 takes",
    "size": "2MB, 300kB, or 40% of what dense int8 takes",
    "max-drop": "1% of the metric of the float model, or 0.01 in the metric's own unit",
}


@dataclass(frozen=True)
class Budget:
    """A limit.

    kind: latency (of one inference), size (of the library) or max-drop (of the metric against the float model)
    value: nanoseconds, bytes, or in the metric's unit; if ``is_relative`` a share: of dense int8, or of the metric
    """

    kind: str
    value: float
    is_relative: bool = False

    @classmethod
    def parse(cls, kind: str, text: str) -> Budget:
        """Read a number with its unit; raises UsageError, which shows the right form."""
        match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(%|[A-Za-z]*)", text.strip())
        number, unit = (float(match[1]), match[2]) if match else (0.0, "?")
        if unit == "%" and number > 0:
            return cls(kind, number / 100, is_relative=True)
        if unit not in _UNITS[kind] or (number <= 0 and kind != "max-drop"):
            raise UsageError(f"--{kind} {text}: is no budget; give {_EXAMPLES[kind]}")
        return cls(kind, number * _UNITS[kind][unit])

    def limit(self, whole: float) -> float:
        """The limit in its own unit, where ``whole`` is what it is relative to."""
        return self.value * whole if self.is_relative else self.value

    def __str__(self) -> str:
        if self.is_relative:
            return f"{100 * self.value:g}%"
        if self.kind == "max-drop":
            return f"{self.value:g}"
        unit, size = ("ms", 1e6) if self.kind == "latency" else ("kB", 1e3)
        return f"{self.value / size:g}{unit}"
