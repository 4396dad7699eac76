"""A pass that takes whole heads out of attention."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tvm
from tvm.ir import IRModule

from pumice.errors import UsageError
from pumice.module import weights_of
from pumice.passes.channel_groups import ChannelGroup, find_channel_groups
from pumice.passes.layers import Layer, find_layers
from pumice.passes.prune_spec import Heads, PruneSpec, parse_prune
from pumice.passes.remove_channels import recorded, removable, remove
from pumice.passes.slice_channels import Removal
from pumice.passes.statistics import Moments, input_moments


@tvm.transform.module_pass(opt_level=0, name="pumice.RemoveHeads")
class RemoveHeads:
    """``reshape(nn.attention(q, k, v)) @ w`` with H heads -> the same with fewer; q, k and v lose those columns.

    Before, for heads of size D::

        q = reshape(x @ wq, [B, T, H, D]);  ...;  y = reshape(nn.attention(q, k, v), [B, T, H * D]) @ w

    After, with the columns of the heads that stay, and their rows of ``w``::

        q = reshape(x @ wq', [B, T, H', D]);  ...;  y = reshape(nn.attention(q, k, v), [B, T, H' * D]) @ w'

    The scale is that of D, and stays. Of every attention ``round(amount * H)`` heads go, at least one stays. A head
    counts for the mean energy of what it adds to the output projection's result, over ``samples`` (as for
    ``Calibrate``); without samples for the energy of its rows of ``w`` alone. Michel et al. (arXiv 1905.10650) take the
    gradient of the loss for this, which would need labels. With samples, the projection makes up for the heads that are
    gone by least squares (``refit_readers``).

    Left alone, with the reason in the layers' notes: attention whose heads share keys, values or weights, or have
    a bias each, and what ``keep`` and ``only`` exclude. Raises UsageError where these name no layer, ModelError where
    the samples do not fit the model.
    """

    def __init__(
        self,
        spec: PruneSpec | str,
        samples: Mapping[str, np.ndarray] | None = None,
        update_weights: bool = True,
    ) -> None:
        """Raises UsageError for a specification that is not of heads."""
        parsed = parse_prune(spec) if isinstance(spec, str) else spec
        if not isinstance(parsed, Heads):
            raise UsageError(f"{parsed} removes no attention heads; write heads:AMOUNT, for example heads:0.25")
        self.spec = parsed
        self.samples = samples
        self.update_weights = update_weights

    def transform_module(self, mod: IRModule, ctx: tvm.transform.PassContext) -> IRModule:
        """Choose the heads and remove them."""
        heads = [group for group in find_channel_groups(mod) if group.kind == "heads"]
        groups, notes = removable(mod, heads, self.spec, "heads")
        projections = {layer.weight.name: layer for layer in find_layers(mod)}
        read = [projections[slot.weight] for group in groups for slot in group.slots_of("consumer")]
        moments = {} if self.samples is None or not read else input_moments(mod, self.samples, read)
        removals = []
        for group in groups:
            energy = head_energy(group, projections, weights_of(mod), moments)
            gone = min(group.channels - 1, round(self.spec.amount * group.channels))
            if gone > 0:
                removals.append(Removal(group, np.sort(np.argsort(energy, kind="stable")[:gone])))
        return recorded(mod, remove(mod, removals, self.samples, self.update_weights), self.spec, notes)


def head_energy(
    group: ChannelGroup,
    projections: Mapping[str, Layer],
    weights: Mapping[str, np.ndarray],
    moments: Mapping[str, Moments],
) -> np.ndarray:
    """``[heads]``: the mean of ``|a_h W_h|^2`` over what each head computes; of ``|W_h|^2`` without moments."""
    energy = np.zeros(group.channels)
    for slot in group.slots_of("consumer"):
        layer = projections[slot.weight]
        rows = layer.to_rows(weights[slot.weight])
        flat = rows.reshape(len(rows), -1).astype(np.float64)
        gram = moments[layer.name].gram[0] if layer.name in moments else np.eye(flat.shape[1])
        for head, inputs in enumerate(slot.positions):
            part = flat[:, inputs]
            energy[head] += float(np.sum((part @ gram[np.ix_(inputs, inputs)]) * part))
    return energy
