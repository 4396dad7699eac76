"""Pruning while training: the schedule, what is chosen, and that zeros hold."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pumice.errors import UsageError
from pumice.frontend.torch import CubicSchedule, GradualPruner, add_fake_quantization, remove_fake_quantization
from pumice.frontend.torch_patterns import units

OPTIMISERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=5e-2),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5),
}
SOON = CubicSchedule(start=2, end=10, initial=0.1, final=0.75, every=3)


class Net(nn.Module):
    """A stem, a convolution, a depthwise one, a one-dimensional one and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.line = nn.Conv1d(8, 12, 2)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.conv(torch.relu(self.stem(x)))))).mean(3)
        result: Tensor = self.head(torch.relu(self.line(x)).mean(2))
        return result


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def train(
    model: nn.Module, pruner: GradualPruner, optimiser: torch.optim.Optimizer, steps: int, first: int = 0
) -> None:
    """The user's own loop; every step has its own batch."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        images, labels = torch.randn(4, 3, 6, 6, generator=generator), torch.arange(4)
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimiser.step()
        pruner.step()


def test_the_schedule_is_cubic() -> None:
    schedule = CubicSchedule(start=10, end=30, initial=0.2, final=0.8, every=5)
    assert [step for step in range(50) if schedule.due(step)] == [10, 15, 20, 25, 30]
    assert [schedule.share(step) for step in (0, 10, 20, 30, 99)] == [
        pytest.approx(share) for share in (0.2, 0.2, 0.8 - 0.6 / 8, 0.8, 0.8)
    ]
    assert [step for step in range(20) if CubicSchedule(0, 7, 0.0, 0.5, 4).due(step)] == [0, 4, 7]
    assert CubicSchedule(3, 3, 0.0, 0.5).share(3) == 0.5


@pytest.mark.parametrize(
    "wrong", [(5, 4, 0, 0.5), (-1, 4, 0, 0.5), (0, 4, 0.6, 0.5), (0, 4, 0, 1.5), (0, 4, 0, 0.5, 0)]
)
def test_what_is_no_schedule(wrong: tuple[Any, ...]) -> None:
    with pytest.raises(UsageError, match="it needs 0 <= "):
        CubicSchedule(*wrong)


def test_a_schedule_of_no_steps_prunes_at_once() -> None:
    pruner = GradualPruner(net(), CubicSchedule(start=0, end=0, initial=0.0, final=0.5), "unstructured")
    assert pruner.sparsity()["all"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("pattern", ["1x4", "unstructured", "4x4"])
def test_zeros_hold_whatever_the_optimiser(optimiser: str, pattern: str) -> None:
    model = net()
    pruner = GradualPruner(model, SOON, pattern, keep=["stem"])
    optimise = OPTIMISERS[optimiser](model.parameters())
    before: dict[str, np.ndarray] = {}
    for step in range(14):
        train(model, pruner, optimise, 1, step)
        for name, mask in pruner.masks().items():
            weight = model.get_parameter(name).detach().numpy()
            assert (weight[~mask] == 0).all() and not np.signbit(weight[~mask]).any()
            assert not (before.get(name, False) & mask).any(), "what was pruned came back"
            before[name] = ~mask
        reached = [SOON.share(s) for s in range(2, step + 2) if SOON.due(s)]
        for name, share in pruner.sparsity().items():
            if name != "all":
                count = units(pruner.pattern, model.get_parameter(name)).numel()
                assert share == pytest.approx(round(max(reached, default=0.0) * count) / count)
    assert (model.stem.weight != 0).all()


def test_what_is_left_alone_has_a_reason() -> None:
    model = net()
    pruner = GradualPruner(model, SOON, "1x4", keep=["st*"], only=["*stem", "conv", "depthwise", "line"])
    assert list(pruner.masks()) == ["conv.weight", "line.weight"]
    assert pruner.left_alone == {
        "stem": "kept by 'st*'",
        "depthwise": "each output channel reads one input channel: it has no neighbours",
        "head": "not among *stem, conv, depthwise, line",
    }
    assert "depthwise.weight" in GradualPruner(model, SOON, "4x1").masks()


def test_a_shared_weight_is_left_alone() -> None:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6), nn.Linear(6, 4))
    model[1].weight = model[0].weight
    assert GradualPruner(model, SOON).left_alone == {"1": "one tensor is the weight of 0.weight, 1.weight"}


def test_magnitude_by_layer_and_of_all_layers() -> None:
    model = nn.Sequential(nn.Linear(8, 1, bias=False), nn.Linear(8, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[4.0, 0, 0, 0, 1, 1, 1, -2]]))
        model[1].weight.copy_(torch.tensor([[9.0, 9, 9, 9, 8, 8, 8, 8]]))
    now = CubicSchedule(0, 0, 0.5, 0.5)
    every, together = copy.deepcopy(model), copy.deepcopy(model)
    masks = GradualPruner(every, now, "1x4").masks()
    assert masks["0.weight"].tolist() == [[False] * 4 + [True] * 4]
    assert masks["1.weight"].tolist() == [[True] * 4 + [False] * 4]
    masks = GradualPruner(together, now, "1x4", scope="global").masks()
    assert not masks["0.weight"].any() and masks["1.weight"].all()


def test_lamp_does_not_see_the_scale_of_a_layer() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(16, 8))
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled[1].weight *= 1024
    schedule = CubicSchedule(0, 0, 0.9, 0.9)
    masks, same = (GradualPruner(m, schedule, "1x4", "lamp").masks() for m in (model, scaled))
    blocks = {name: mask.reshape(8, 4, 4)[..., 0] for name, mask in masks.items()}
    assert all((mask == same[name]).all() for name, mask in masks.items())
    # Brute force: each block's squares over the squares of those that are no smaller.
    scores = {}
    for name in blocks:
        squares = model.get_parameter(name).detach().numpy().astype(np.float64).reshape(8, 4, 4) ** 2
        squares = squares.sum(-1)
        for place, own in np.ndenumerate(squares):
            scores[name, *place] = own / squares[squares >= own].sum()
    best = sorted(scores, key=scores.__getitem__)[round(0.9 * len(scores)) :]
    assert {(name, *place) for name, kept in blocks.items() for place in np.argwhere(kept).tolist()} == {
        (name, *place) for name, *place in best
    }


def test_movement_removes_what_training_makes_small() -> None:
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 0.5, -2.0, 1.0]]))
    wrapped = nn.Sequential(model)
    pruner = GradualPruner(wrapped, CubicSchedule(2, 2, 0.0, 0.5), "unstructured", "movement")
    optimiser = torch.optim.SGD(wrapped.parameters(), 0.1)
    wanted = torch.zeros(1, 4)
    for direction in (torch.tensor([[1.0, -1.0, 1.0, 2.0]]), torch.tensor([[1.0, -1.0, 1.0, -1.0]])):
        wanted -= model.weight.detach() * direction
        optimiser.zero_grad()
        for _ in range(2):  # gradients that are gathered count as often as they were computed
            (model.weight * direction / 2).sum().backward()
        optimiser.step()
        pruner.step()
    # 3.0 shrinks by most, then 1.0; 0.5 grows, and so does -2.0: size alone would take 0.5 and 1.0
    assert wanted.tolist() == [pytest.approx([-5.9, 1.1, 4.1, -1.2])]
    assert pruner.state_dict()["score"]["0.weight"].tolist() == [pytest.approx(wanted[0].tolist())]
    assert pruner.masks()["0.weight"].tolist() == [[False, True, True, False]]


def test_activation_weighs_by_the_input() -> None:
    model = nn.Sequential(nn.Conv2d(4, 2, 1, groups=2, bias=False)).train()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 1.0], [1.0, 2.0]]).view(2, 2, 1, 1))
    pruner = GradualPruner(model, CubicSchedule(1, 1, 0.0, 0.5), "unstructured", "activation")
    scale = torch.tensor([1.0, 5.0, 4.0, 1.0]).view(1, 4, 1, 1)
    with torch.no_grad():
        model(scale * torch.ones(2, 4, 3, 3) * torch.tensor([1.0, -1.0, 1.0]))
    assert pruner.state_dict()["score"]["0.weight"].tolist() == [[1.0, 25.0], [16.0, 1.0]]  # mean squares, by group
    copy.deepcopy(model)(scale * 100)
    model.eval()(scale * 100)
    assert pruner.state_dict()["score"]["0.weight"].tolist() == [[1.0, 25.0], [16.0, 1.0]]
    pruner.step()  # 3, 5 / 4, 2
    assert pruner.masks()["0.weight"].squeeze().tolist() == [[False, True], [True, False]]


def test_n_of_m_grows_to_its_share() -> None:
    model = net()
    pruner = GradualPruner(model, CubicSchedule(1, 5, 0.0, 0.5), "2:4", only=["conv", "line"])
    train(model, pruner, OPTIMISERS["adam"](model.parameters()), 3)
    assert 0.3 < pruner.sparsity()["all"] < 0.5
    train(model, pruner, OPTIMISERS["adam"](model.parameters()), 3)
    for name in pruner.masks():
        groups = model.get_parameter(name).detach().flatten(2).transpose(1, 2).reshape(-1, 4)
        assert ((groups == 0).sum(1) == 2).all()


def test_loading_a_state_dict_keeps_the_zeros() -> None:
    model, dense = net(), net(1)
    pruner = GradualPruner(model, CubicSchedule(0, 0, 0.5, 0.5))
    masks = pruner.masks()
    teacher = copy.deepcopy(model)
    for holder in (model, nn.ModuleDict({"inner": model})):
        state = dense.state_dict() if holder is model else nn.ModuleDict({"inner": dense}).state_dict()
        holder.load_state_dict(state)
        for name, mask in masks.items():
            wanted = torch.where(torch.from_numpy(mask), dense.get_parameter(name), 0.0)
            assert torch.equal(model.get_parameter(name), wanted)
    teacher.load_state_dict(dense.state_dict())
    assert torch.equal(teacher.head.weight, dense.head.weight), "a copy is not pruned"
    pruner.remove()
    model.load_state_dict(dense.state_dict())
    assert torch.equal(model.head.weight, dense.head.weight)


@pytest.mark.parametrize("score", ["magnitude", "movement", "lamp", "activation"])
def test_a_run_that_is_resumed_ends_like_one_that_is_not(score: str) -> None:
    whole = net()
    pruner = GradualPruner(whole, SOON, "1x4", score)
    train(whole, pruner, OPTIMISERS["adam"](whole.parameters()), 12)

    first = net()
    pruner = GradualPruner(first, SOON, "1x4", score)
    optimiser = OPTIMISERS["adam"](first.parameters())
    train(first, pruner, optimiser, 6)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimiser": optimiser.state_dict(), "pruner": pruner.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed = net(7)
    pruner = GradualPruner(resumed, SOON, "1x4", score)
    optimiser = OPTIMISERS["adam"](resumed.parameters())
    resumed.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    pruner.load_state_dict(state["pruner"])
    train(resumed, pruner, optimiser, 6, first=6)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_the_state_of_another_pruner_is_refused() -> None:
    state = GradualPruner(net(), SOON, keep=["stem"]).state_dict()
    with pytest.raises(UsageError, match="is of other weights than the model's"):
        GradualPruner(net(), SOON).load_state_dict(state)
    state = GradualPruner(net(), SOON).state_dict()
    with pytest.raises(UsageError, match=r"\(score\) is of other weights"):
        GradualPruner(net(), SOON, score="movement").load_state_dict(state)


def test_zeros_of_an_earlier_pruner_go_first() -> None:
    model = net()
    GradualPruner(model, CubicSchedule(0, 0, 0.5, 0.5), "1x4", only=["conv"]).remove()
    zero = model.conv.weight == 0
    pruner = GradualPruner(model, CubicSchedule(0, 4, 0.5, 0.75), "1x4", "movement", only=["conv"])
    assert torch.equal(~torch.from_numpy(pruner.masks()["conv.weight"]), zero)


def test_it_prunes_what_fake_quantization_stands_before() -> None:
    model = net()
    pruner = GradualPruner(model, SOON)
    optimiser = OPTIMISERS["adam"](model.parameters())
    train(model, pruner, optimiser, 5)
    add_fake_quantization(model)
    train(model, pruner, optimiser, 7, first=5)
    assert pruner.sparsity()["all"] == pytest.approx(0.75, abs=0.02)
    for name, mask in pruner.masks().items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert (layer.weight[~torch.from_numpy(mask)] == 0).all()
    remove_fake_quantization(model)
    train(model, pruner, optimiser, 2, first=12)
    for name, mask in pruner.masks().items():
        assert (model.get_parameter(name)[~torch.from_numpy(mask)] == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "3x3"}, "pruning pattern '3x3' is not known"),
        ({"pattern": "3:4"}, "leaves no more than 0.25 of the weights zero"),
        ({"score": "random"}, "the score 'random' is not known: give magnitude, movement, lamp, activation"),
        ({"scope": "some"}, "scope 'some' with score 'magnitude'"),
        ({"score": "lamp", "scope": "layer"}, "scope 'layer' with score 'lamp'"),
        ({"keep": ["stme"]}, "'stme' names no layer of Net; it has stem, conv, depthwise"),
        ({"keep": ["*"]}, "Net has no layer to prune"),
    ],
)
def test_what_cannot_be_done_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GradualPruner(net(), SOON, **options)
