"""PyTorch models in: a live ``nn.Module`` with example inputs, or a saved ``.pt2`` program."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tvm.ir import IRModule

from pumice.errors import MissingDependencyError, ModelError, PumiceError, UnsupportedError, UsageError
from pumice.module import mask_sources_of, with_mask_sources

try:
    import torch
except ImportError as error:
    raise MissingDependencyError("a PyTorch model needs the package torch: pip install 'pumice[torch]'") from error

from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument

from pumice.frontend.torch_archive import load_program
from pumice.frontend.torch_import import import_program
from pumice.frontend.torch_masks import materialise_masks
from pumice.frontend.torch_operators import first_line

Inputs = Mapping[str, "tuple[int, ...] | torch.Tensor"] | tuple[torch.Tensor, ...]

_log = logging.getLogger("pumice.frontend")


def read_torch(module: torch.nn.Module, inputs: Inputs) -> IRModule:
    """The module form of a live module, which stays as it was: weights, masks, training flags and all.

    ``inputs`` are examples: a tensor for each argument of ``forward``, by name or in order; by name a shape will do
    for a float32 input. All shapes are pinned to the examples. The model is read in evaluation mode and, when its
    weights are float16, bfloat16 or float64, in float32. Weights that ``torch.nn.utils.prune`` or a parametrization
    masks appear under their plain name with the masked positions exactly 0; ``mask_sources_of`` tells which.

    Raises UsageError for inputs that do not fit ``forward``, ModelError for a model that fails on them, and
    UnsupportedError for one that cannot be traced or that has an operator which cannot be imported.
    """
    source = type(module).__name__
    frozen = frozen_copy(module, source)
    masks = materialise_masks(frozen, source)
    args, kwargs = _bound(inputs, frozen, source)
    program = _export(frozen, args, kwargs, source)
    mod = import_program(program, source)
    return with_mask_sources(mod, {**mask_sources_of(mod), **masks})


def read_pt2(path: str | Path, inputs: Mapping[str, tuple[int, ...]] | None = None) -> IRModule:
    """The module form of a program that ``torch.export.save`` wrote; nothing in the file is executed.

    ``inputs`` gives shapes by input name and is needed where the program was exported with dynamic shapes.
    Raises ModelError for a file that is not such a program or that would run code when loaded, UsageError for
    shapes that are missing or do not fit, and UnsupportedError as ``read_torch`` does.
    """
    source = Path(path).name
    program = load_program(Path(path))
    program = _pinned(program, dict(inputs or {}), source)
    return import_program(program, source)


def frozen_copy(module: torch.nn.Module, source: str) -> torch.nn.Module:
    """A copy in evaluation mode, on the CPU, in float32."""
    # A pruned module keeps `weight_orig * weight_mask` as a plain attribute, which deepcopy refuses because autograd
    # made it: such tensors are handed over already copied.
    derived = {
        id(value): value.detach().clone()
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, torch.Tensor) and not value.is_leaf
    }
    try:
        frozen = copy.deepcopy(module, derived)
    except Exception as error:
        raise ModelError(
            f"{source}: cannot be copied ({first_line(error)}); pass a module that deepcopy can copy"
        ) from error
    frozen = frozen.eval().cpu().requires_grad_(False)
    state = [*frozen.parameters(), *frozen.buffers()]
    narrow = {str(t.dtype).removeprefix("torch.") for t in state if t.is_floating_point() and t.dtype != torch.float32}
    if narrow:
        _log.warning("%s: weights in %s are read as float32", source, ", ".join(sorted(narrow)))
        frozen = frozen.float()
    return frozen


def _bound(inputs: Inputs, module: torch.nn.Module, source: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``inputs`` as the arguments of ``forward``, in its order."""
    if not isinstance(inputs, Mapping):
        if not isinstance(inputs, tuple):
            raise UsageError(f"{source}: inputs must be a dict of shapes or tensors by name, or a tuple of tensors")
        return tuple(_example(value, f"number {i}", source) for i, value in enumerate(inputs)), {}
    signature = inspect.signature(module.forward)
    try:
        bound = signature.bind(**{name: _example(value, f"'{name}'", source) for name, value in inputs.items()})
    except TypeError as error:
        raise UsageError(
            f"{source}: the inputs {', '.join(inputs) or '(none)'} do not fit forward{signature}: {error}"
        ) from error
    return bound.args, bound.kwargs


def _example(value: Any, which: str, source: str) -> Any:
    """An example tensor for a tensor or a shape, in lists and dicts of them too."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple) and all(isinstance(extent, int) for extent in value):
        if any(extent < 1 for extent in value):
            raise UsageError(f"{source}: input {which} has the shape {_shown(value)}: every extent must be positive")
        return torch.rand(value, generator=torch.Generator().manual_seed(0))
    if isinstance(value, (list, tuple)):
        return type(value)(_example(part, which, source) for part in value)
    if isinstance(value, dict):
        return {key: _example(part, which, source) for key, part in value.items()}
    raise UsageError(f"{source}: input {which} is of type {type(value).__name__}: give a tensor or a shape")


def _export(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], source: str) -> ExportedProgram:
    try:
        return torch.export.export(module, args, kwargs)
    except Exception as error:
        _try_forward(module, args, kwargs, source)
        raise UnsupportedError(
            f"{source}: torch.export cannot trace forward ({first_line(error)}); see torch.export's documentation"
            " on what may depend on data"
        ) from error


def _try_forward(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], source: str) -> None:
    """Tell a model that fails on these inputs anyway from one that only tracing cannot follow."""
    try:
        with torch.no_grad():
            module(*args, **kwargs)
    except Exception as error:
        raise ModelError(f"{source}: forward fails on the example inputs: {first_line(error)}") from error


def _pinned(program: ExportedProgram, shapes: dict[str, tuple[int, ...]], source: str) -> ExportedProgram:
    """``program`` with static shapes: those given, and its own where they are static already."""
    examples: dict[str, torch.Tensor] = {}
    dynamic = False
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    for spec in program.graph_signature.input_specs:
        if spec.kind is not InputKind.USER_INPUT or not isinstance(spec.arg, TensorArgument):
            continue
        name, value = spec.arg.name, nodes[spec.arg.name].meta["val"]
        fixed = all(isinstance(extent, int) for extent in value.shape)
        dynamic = dynamic or not fixed
        shape = shapes.pop(name, tuple(value.shape) if fixed else None)
        if shape is None:
            raise UsageError(
                f"{source}: input '{name}' has the dynamic shape {_shown(value.shape)}: give one, as in"
                f" --input {name}={_shown(value.shape, fill=True)}"
            )
        if len(shape) != value.ndim or any(
            isinstance(n, int) and n != m for n, m in zip(value.shape, shape, strict=True)
        ):
            raise UsageError(f"{source}: input '{name}' was exported as {_shown(value.shape)}, not {_shown(shape)}")
        examples[name] = torch.zeros(tuple(shape), dtype=value.dtype)
    if shapes:
        raise UsageError(
            f"{source}: has no input '{next(iter(shapes))}'; its inputs are {', '.join(examples) or 'none'}"
        )
    return _respecialised(program, examples, source) if dynamic else program


def _respecialised(program: ExportedProgram, examples: dict[str, torch.Tensor], source: str) -> ExportedProgram:
    """The same program exported once more, with the examples' shapes."""
    args, kwargs = torch.utils._pytree.tree_unflatten(list(examples.values()), program.call_spec.in_spec)
    program.example_inputs = (args, kwargs)  # read_pt2 left the file's own, a pickle, unread
    try:
        return torch.export.export(program.module(), args, kwargs)
    except PumiceError:
        raise
    except Exception as error:
        shapes = ", ".join(f"{name}={_shown(value.shape)}" for name, value in examples.items())
        raise UsageError(f"{source}: the program does not take the shapes {shapes}: {first_line(error)}") from error


def _shown(shape: Any, fill: bool = False) -> str:
    return "x".join("1" if fill and not isinstance(extent, int) else str(extent) for extent in shape) or "scalar"
