"""Masks that a live module carries: ``torch.nn.utils.prune`` and parametrizations -> plain, zeroed weights."""

from __future__ import annotations

import torch
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from pumice.errors import ModelError


def materialise_masks(module: torch.nn.Module, source: str) -> dict[str, str]:
    """Change ``module`` in place so that every parameter is plain again; return the masked ones and by what.

    ``weight_orig, weight_mask, pre-hook -> weight`` and ``parametrizations.weight.original, .0.mask -> weight``.
    Masked positions are exactly 0, all others keep their bits. A parametrization without a mask of the weight's
    shape is computed once and leaves no entry. Raises ModelError for a mask that is not 0 and 1.
    """
    masked: dict[str, str] = {}
    for path, part in module.named_modules():
        prefix = f"{path}." if path else ""
        for name in _fold_prune_hooks(part, prefix, source):
            masked[prefix + name] = "torch.nn.utils.prune"
    for path, part in list(module.named_modules()):
        prefix = f"{path}." if path else ""
        for name in _fold_parametrizations(part, prefix, source):
            masked[prefix + name] = "torch.nn.utils.parametrize"
    return masked


def _fold_prune_hooks(part: torch.nn.Module, prefix: str, source: str) -> list[str]:
    folded = []
    for key, hook in list(part._forward_pre_hooks.items()):
        if not isinstance(hook, BasePruningMethod):
            continue
        name = hook._tensor_name
        original, mask = getattr(part, f"{name}_orig"), getattr(part, f"{name}_mask")
        keep = _kept(mask, f"{prefix}{name}_mask", source)
        del part._forward_pre_hooks[key], part._parameters[f"{name}_orig"], part._buffers[f"{name}_mask"]
        vars(part).pop(name, None)
        part.register_parameter(name, _parameter(torch.where(keep, original, 0.0)))
        folded.append(name)
    return folded


def _fold_parametrizations(part: torch.nn.Module, prefix: str, source: str) -> list[str]:
    if not parametrize.is_parametrized(part):
        return []
    steps = {name: list(chain) for name, chain in part.parametrizations.items()}
    weights = {name: getattr(part, name).detach() for name in steps}
    # torch's remove_parametrizations would delete the property from the class, which a copy shares with the user's
    # own module: the copy gets its plain class back instead.
    part.__class__ = type(part).__bases__[0]
    del part._modules["parametrizations"]
    folded = []
    for name, chain in steps.items():
        buffers = [(key, buffer) for step in chain for key, buffer in step.named_buffers()]
        for key, mask in buffers:
            if "mask" not in key or mask.shape != weights[name].shape:
                continue
            keep = _kept(mask, f"{prefix}parametrizations.{name} {key}", source)
            # A later step may have filled the holes again: then it is no mask of the weight that is used.
            if bool((weights[name][~keep] == 0).all()):
                weights[name] = torch.where(keep, weights[name], 0.0)
                folded.append(name)
        part.register_parameter(name, _parameter(weights[name]))
    return list(dict.fromkeys(folded))


def _kept(mask: torch.Tensor, name: str, source: str) -> torch.Tensor:
    keep = mask != 0
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ModelError(f"{source}: '{name}' holds values other than 0 and 1, so it is not a mask")
    return keep


def _parameter(value: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(value.detach().clone(), requires_grad=False)
