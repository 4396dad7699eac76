"""Losses by which a network learns from its dense self, for classifiers and for sentence encoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pumice.errors import UsageError


def soft_label_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """How far the student's class probabilities are from the teacher's, both softened (arXiv 1503.02531).

    ``student`` and ``teacher`` are logits ``[B, classes]``. The Kullback-Leibler divergence, averaged over the batch,
    times the squared temperature, so that gradients keep their size whatever the temperature.
    """
    target = (teacher.detach().float() / temperature).log_softmax(-1)
    answer = (student.float() / temperature).log_softmax(-1)
    return F.kl_div(answer, target, reduction="batchmean", log_target=True) * temperature**2


def hidden_state_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean squared error of hidden states, in units of the teacher's mean square (as TinyBERT, arXiv 1909.10351).

    Both are ``[B, T, width]``, or any shape without ``mask``; ``mask [B, T]`` is 1 at real tokens, and only these
    count. 1 means that the student's states tell nothing of the teacher's.
    """
    student, teacher = student.float(), teacher.detach().float()
    if mask is not None:
        real = mask.to(student.dtype).unsqueeze(-1)
        student, teacher = student * real, teacher * real  # 0 in both adds nothing to the sums below
    return F.mse_loss(student, teacher, reduction="sum") / teacher.square().sum().clamp_min(1e-12)


def embedding_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine of student's and teacher's embeddings ``[B, width]``, averaged over the batch."""
    return 1 - F.cosine_similarity(student.float(), teacher.detach().float(), dim=-1).mean()


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """How far the cosines between the batch's embeddings are from the teacher's (relational, arXiv 1904.05068).

    Embeddings are ``[B, width]``; the mean squared difference over the pairs of different samples.
    """
    student, teacher = F.normalize(student.float(), dim=-1), F.normalize(teacher.detach().float(), dim=-1)
    difference = student @ student.T - teacher @ teacher.T
    pairs = max(len(student) * (len(student) - 1), 1)
    return difference.fill_diagonal_(0).square().sum() / pairs


class HiddenStates(Mapping[str, Tensor]):
    """What the named modules returned in the model's last forward pass, by module name::

        with HiddenStates(student, ["encoder.layer.*"]) as states:
            embedding = student(**batch)
            loss = sum(hidden_state_loss(states[name], wanted[name]) for name in states)

    ``modules`` are globs of module names, in which ``*`` does not match a dot. Of a module that returns a tuple the
    first tensor is kept. Raises UsageError for a glob that names no module.
    """

    def __init__(self, model: nn.Module, modules: Sequence[str]) -> None:
        found: dict[str, nn.Module] = {}
        for glob in modules:
            matching = {name: part for name, part in model.named_modules() if _matches(name, glob)}
            if not matching:
                raise UsageError(f"{glob!r} names no module of {type(model).__name__}")
            found |= matching
        self._states: dict[str, Tensor] = {}
        self._handles = [part.register_forward_hook(self._hook(name, part)) for name, part in found.items()]

    def __getitem__(self, name: str) -> Tensor:
        return self._states[name]

    def __iter__(self) -> Any:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)

    def __enter__(self) -> HiddenStates:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Stop watching the model."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str, watched: nn.Module) -> Callable[[nn.Module, Any, Any], None]:
        def keep(part: nn.Module, inputs: Any, output: Any) -> None:
            if part is watched:  # a copy of the model takes its hooks along
                self._states[name] = output[0] if isinstance(output, tuple) else output

        return keep


def _matches(name: str, glob: str) -> bool:
    return name.count(".") == glob.count(".") and fnmatchcase(name, glob)
