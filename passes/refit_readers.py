"""How the readers of channels that are removed make up for them: by least squares over calibration data.

A layer ``y = W x + b`` loses the inputs ``r`` and keeps ``k``. What ``x_r`` contributed is replaced by its best linear
prediction from ``x_k``: with ``C`` the covariance of the inputs and ``m`` their mean ::

    V = W_k + W_r C_rk C_kk^-1,    b' = b + W m - V m_k

which is the least-squares reconstruction of He et al., Channel Pruning for Accelerating Very Deep Neural Networks
(arXiv 1707.06168), with a bias. Where ``V`` has to stay ``W_k``, what is left of it is the mean of what was removed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from tvm import relax
from tvm.ir import IRModule
from tvm.relax.op import add

from pumice.module import weights_of, with_weights
from pumice.passes.dataflow import Dataflow
from pumice.passes.layers import Layer, find_layers
from pumice.passes.rewriting import Rewriter, array_of, rewrite
from pumice.passes.slice_channels import Removal
from pumice.passes.sparsity import classify_zeros
from pumice.passes.statistics import Moments

# Added to the covariance's diagonal, relative to its mean: what keeps noise in few samples from being fitted.
_DAMPING = 0.01


def readers(mod: IRModule, removals: Sequence[Removal]) -> list[Layer]:
    """The layers of ``mod`` that read a channel which goes."""
    names = {
        slot.weight for removal in removals if len(removal.channels) for slot in removal.group.slots_of("consumer")
    }
    return [layer for layer in find_layers(mod) if layer.weight.name in names]


def refit_readers(
    mod: IRModule, removals: Sequence[Removal], moments: Mapping[str, Moments], update_weights: bool = True
) -> IRModule:
    """``mod``, still with all channels, in which ``readers`` no longer need those that go.

    ``moments`` are those of the readers' inputs. With ``update_weights`` the weights of the channels that stay change,
    but for layers with zeros in a pattern, where the mean alone is made up for, as in all layers without it. A layer
    without bias gets one. The weights of channels that go are left as they are. Weights that several layers share are
    not touched.
    """
    graph, weights = Dataflow(mod), dict(weights_of(mod))
    shifts: dict[relax.Var, np.ndarray] = {}
    for layer in readers(mod, removals):
        if len(graph.users[layer.weight]) > 1 or layer.name not in moments:
            continue
        rows = layer.to_rows(weights[layer.weight.name])
        gone = _removed_inputs(layer, removals, rows.shape[2])
        update = update_weights and classify_zeros(rows).pattern == "dense"
        new, shift = refitted(rows, gone, moments[layer.name], update)
        weights[layer.weight.name] = layer.from_rows(new.astype(rows.dtype))
        shifts[layer.var] = shift
    return _with_biases(with_weights(mod, weights), shifts)


def refitted(rows: np.ndarray, gone: np.ndarray, moments: Moments, update: bool) -> tuple[np.ndarray, np.ndarray]:
    """The new ``rows [N, taps, C]``, float64, and what to add to the bias, ``[N]``, when the inputs ``gone [C]`` go."""
    n, taps, _ = rows.shape
    groups, inputs = moments.mean.shape
    lost = np.tile(gone, taps)
    flat = rows.reshape(groups, n // groups, inputs).astype(np.float64)
    new, shift = flat.copy(), np.zeros((groups, n // groups))
    for group, (weight, gram, mean) in enumerate(zip(flat, moments.gram, moments.mean, strict=True)):
        if update:
            covariance = gram - np.outer(mean, mean)
            inner = covariance[np.ix_(~lost, ~lost)]
            damping = _DAMPING * max(float(np.trace(inner)) / max(1, len(inner)), 1e-30)
            cross = weight[:, lost] @ covariance[np.ix_(lost, ~lost)]
            change = np.linalg.solve(inner + damping * np.eye(len(inner)), cross.T).T
            new[group][:, ~lost] += np.where(weight[:, ~lost] == 0, 0, change)
        shift[group] = weight @ mean - new[group][:, ~lost] @ mean[~lost]
    return new.reshape(rows.shape), shift.ravel()


def _removed_inputs(layer: Layer, removals: Sequence[Removal], channels: int) -> np.ndarray:
    """Which of a layer's input channels go, bool ``[C]``, C being those of one group."""
    gone = np.zeros(channels, bool)
    for removal in removals:
        for slot in removal.group.slots_of("consumer"):
            if slot.weight == layer.weight.name:
                gone[slot.positions[removal.channels]] = True
    return gone


def _with_biases(mod: IRModule, shifts: Mapping[relax.Var, np.ndarray]) -> IRModule:
    """Add to the bias of each of these layers' results, or give them one."""
    graph, weights = Dataflow(mod), weights_of(mod)
    layers = {graph.biased(layer.var): layer for layer in find_layers(mod) if layer.var in shifts}

    def visit(rewriter: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        layer = layers.get(var)
        if layer is None:
            return None
        shift, name = shifts[layer.var], f"{layer.name}.bias"
        old = graph.bias(var, layer.var)
        if old is None:
            shape = [1, -1, 1, 1] if layer.operator == "conv2d" else [-1]
            return add(rewriter.emit(value), rewriter.weight(name, shift.astype(np.float32).reshape(shape)))
        array = array_of(old, weights)
        if isinstance(old, relax.Var) and graph.users[old] == [var]:
            name = old.name
        new = rewriter.weight(name, (array + shift.reshape(array.shape)).astype(array.dtype))
        return add(*(new if argument.same_as(old) else argument for argument in value.args))

    return rewrite(mod, visit) if layers else mod
