"""Losses of distillation, against numpy; and hidden states."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from pumice.errors import UsageError
from pumice.frontend.torch import (
    HiddenStates,
    embedding_loss,
    hidden_state_loss,
    similarity_loss,
    soft_label_loss,
)

RANDOM = np.random.default_rng(0)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def test_soft_labels() -> None:
    student, teacher = RANDOM.normal(size=(2, 5, 4))
    p, q = softmax(teacher / 3), softmax(student / 3)
    wanted = 9 * (p * np.log(p / q)).sum() / 5
    got = soft_label_loss(torch.tensor(student), torch.tensor(teacher), temperature=3)
    assert got.item() == pytest.approx(wanted, rel=1e-5)
    assert soft_label_loss(torch.tensor(student), torch.tensor(student)).item() == pytest.approx(0, abs=1e-6)


def test_hidden_states_count_real_tokens_in_units_of_the_teacher() -> None:
    student, teacher = RANDOM.normal(size=(2, 3, 4, 5))
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    real = mask.astype(bool)
    wanted = ((student - teacher)[real] ** 2).mean() / (teacher[real] ** 2).mean()
    got = hidden_state_loss(torch.tensor(student), torch.tensor(teacher), torch.tensor(mask))
    assert got.item() == pytest.approx(wanted, rel=1e-5)
    whole = hidden_state_loss(torch.tensor(student), torch.tensor(teacher)).item()
    assert whole == pytest.approx(((student - teacher) ** 2).sum() / (teacher**2).sum(), rel=1e-5)
    assert hidden_state_loss(torch.zeros(3, 4), torch.tensor(teacher[0, :3, :4])).item() == pytest.approx(1)


def test_embeddings_by_direction() -> None:
    student, teacher = RANDOM.normal(size=(2, 6, 4))
    units = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (student, teacher)]
    got = embedding_loss(torch.tensor(student), torch.tensor(7 * teacher))
    assert got.item() == pytest.approx(1 - (units[0] * units[1]).sum(1).mean(), rel=1e-5)
    difference = units[0] @ units[0].T - units[1] @ units[1].T
    np.fill_diagonal(difference, 0)
    got = similarity_loss(torch.tensor(student), torch.tensor(7 * teacher))
    assert got.item() == pytest.approx((difference**2).sum() / 30, rel=1e-4)
    turned = np.linalg.qr(RANDOM.normal(size=(4, 4)))[0]
    assert similarity_loss(torch.tensor(teacher @ turned), torch.tensor(teacher)).item() == pytest.approx(0, abs=1e-9)
    assert similarity_loss(torch.ones(1, 4), torch.ones(1, 4)).item() == 0


@pytest.mark.parametrize("loss", [soft_label_loss, hidden_state_loss, embedding_loss, similarity_loss])
def test_only_the_student_learns(loss: object) -> None:
    student, teacher = torch.randn(2, 3, 4).requires_grad_().unbind()
    student.retain_grad()
    teacher.retain_grad()
    loss(student, teacher).backward()  # type: ignore[operator]
    assert student.grad is not None and bool(student.grad.any()) and teacher.grad is None


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))
        self.memory = nn.GRU(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        result: torch.Tensor = self.memory(x)[0]
        return result


def test_hidden_states_by_name() -> None:
    model = Encoder()
    x = torch.randn(2, 4)
    with HiddenStates(model, ["layers.*", "memory"]) as states:
        result = model(x)
        assert list(states) == ["layers.0", "layers.1", "layers.2", "memory"]
        assert torch.equal(states["layers.1"], model.layers[1](states["layers.0"]))
        assert states["memory"] is result
        kept = dict(states)
        copy.deepcopy(model)(x + 1)
        assert all(states[name] is value for name, value in kept.items() if name != "layers.1")
    model(x - 1)
    assert states["memory"] is result
    with pytest.raises(UsageError, match=r"'layer\.\*' names no module of Encoder"):
        HiddenStates(model, ["layer.*"])
