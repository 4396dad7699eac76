"""An ExportedProgram -> the module form: one Relax function with every weight a parameter under its source name."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import tvm
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, OutputKind, TensorArgument
from torch.utils import _pytree as pytree
from tvm import relax
from tvm.ir import IRModule
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from pumice.errors import UnsupportedError
from pumice.frontend.torch_operators import KEPT_WHOLE, converters, first_line, operator_of, place_of
from pumice.module import with_mask_sources, with_output_names, with_source, with_weights


def import_program(program: ExportedProgram, source: str) -> IRModule:
    """``program`` (static shapes, float32) in the module form.

    Parameters and buffers that are floats become parameters of ``main`` under their state-dict names, tensors that
    the export lifted out of the code become parameters under the name it gave them, integer buffers become
    constants. Raises UnsupportedError for an operator, a data type or a side effect that cannot be imported right.
    """
    table = torch.export.default_decompositions()
    for operator in KEPT_WHOLE:
        table.pop(operator, None)
    try:
        program = program.run_decompositions(table)
    except Exception as error:
        raise UnsupportedError(f"{source}: torch cannot decompose the program: {first_line(error)}") from error
    _drop_metadata_checks(program)
    _refuse_side_effects(program, source)
    _refuse_data_types(program, source)
    return _Translation(program, source).module()


class _Translation:
    """One program on its way into Relax: what is known of each node so far, and the weights met."""

    def __init__(self, program: ExportedProgram, source: str) -> None:
        self.program = program
        self.source = source
        self.importer = ExportedProgramImporter()
        self.builder = self.importer.block_builder = relax.BlockBuilder()
        self.converters = converters(self.importer, source)
        self.known: dict[fx.Node, Any] = {}  # what does not depend on inputs and weights, computed by torch
        self.weights: dict[str, np.ndarray] = {}
        self.masked: dict[str, str] = {}

    def module(self) -> IRModule:
        """Translate the graph; weights that nothing reads are left out."""
        folded = self._fold_masks()
        inputs, weights = self._parameters()
        with self.builder.function("main", inputs + folded + weights, attrs={"num_input": len(inputs)}):
            with self.builder.dataflow():
                outputs = self._translate()
                result = self.builder.emit_output(outputs[0] if len(outputs) == 1 else relax.Tuple(outputs))
            self.builder.emit_func_output(result)
        mod = tvm.ir.transform.Sequential(
            [relax.transform.CanonicalizeBindings(), relax.transform.DeadCodeElimination(["main"])]
        )(self.builder.get())
        mod = with_weights(mod, self.weights)
        mod = with_mask_sources(mod, self.masked)
        mod = with_output_names(mod, output_names(self.program))
        return with_source(mod, self.source)

    def _fold_masks(self) -> list[relax.Var]:
        """``weight_orig * weight_mask -> weight``, as a pruned module that was exported has it."""
        specs = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs if spec.target}
        variables = []
        for node in list(self.program.graph.nodes):
            if node.op != "call_function" or node.target is not torch.ops.aten.mul.Tensor:
                continue
            pair = [specs.get(getattr(operand, "name", "")) for operand in node.args]
            name = _pruned_name([str(spec.target) for spec in pair if spec is not None])
            if name is None:
                continue
            by_role = {str(spec.target).rsplit("_", 1)[-1]: _value_of(spec, self.program) for spec in pair if spec}
            original, mask = by_role["orig"], by_role["mask"]
            if mask.shape != original.shape or not bool(((mask == 0) | (mask == 1)).all()):
                continue
            if name not in self.weights:
                self.weights[name] = torch.where(mask != 0, original, 0.0).detach().cpu().contiguous().numpy()
                self.masked[name] = "torch.nn.utils.prune"
                variables.append(self._variable(node, name))
            else:
                self.importer.env[node] = next(v for v in variables if v.name == name)
        return variables

    def _parameters(self) -> tuple[list[relax.Var], list[relax.Var]]:
        """Inputs and weights of the program, each entered in the importer's environment."""
        inputs, weights = [], []
        placeholders = {node.name: node for node in self.program.graph.nodes if node.op == "placeholder"}
        for spec in self.program.graph_signature.input_specs:
            if not isinstance(spec.arg, TensorArgument):
                continue
            node = placeholders[spec.arg.name]
            if spec.kind is InputKind.USER_INPUT:
                inputs.append(self._variable(node, spec.arg.name))
            elif any(user not in self.importer.env for user in node.users):
                value = _value_of(spec, self.program).detach().cpu()
                if value.dtype.is_floating_point and value.ndim:
                    weights.append(self._variable(node, str(spec.target)))
                    self.weights[str(spec.target)] = value.contiguous().numpy()
                else:
                    self.known[node] = value
        return inputs, weights

    def _variable(self, node: fx.Node, name: str) -> relax.Var:
        value = node.meta["val"]
        dtype = str(value.dtype).removeprefix("torch.")
        variable = relax.Var(name, relax.TensorType([int(extent) for extent in value.shape], dtype))
        self.importer.env[node] = variable
        return variable

    def _translate(self) -> list[relax.Expr]:
        for node in self.program.graph.nodes:
            if node.op == "get_attr":
                raise UnsupportedError(f"{self.source}: {place_of(node)} holds control flow, which is not supported")
            if node.op == "call_function" and node not in self.importer.env and not self._computed(node):
                self._convert(node)
        returned = self.program.graph.output_node().args[0]
        return [self._expression(node) for node in returned if isinstance(node, fx.Node)]

    def _convert(self, node: fx.Node) -> None:
        name = getattr(node.target, "__name__", "")
        if name not in self.converters:
            raise UnsupportedError(
                f"{self.source}: operator {operator_of(node)} at {place_of(node)} is not supported; rewrite that step"
                " of the model with operators that are"
            )
        for operand in node.all_input_nodes:
            self._expression(operand)
        self.importer.env[node] = self.converters[name](node)

    def _computed(self, node: fx.Node) -> bool:
        """Compute by torch what depends on nothing but constants, or on an input's shape alone."""
        by_shape = node.target in _BY_SHAPE
        if not (by_shape or all(operand in self.known for operand in node.all_input_nodes)):
            return False
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise UnsupportedError(
                f"{self.source}: operator {operator_of(node)} at {place_of(node)} is random, which is not supported"
            )
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._concrete)
        try:
            self.known[node] = node.target(*args, **kwargs)
        except Exception as error:
            raise UnsupportedError(
                f"{self.source}: operator {operator_of(node)} at {place_of(node)} fails: {first_line(error)}"
            ) from error
        if node.target in _UNDEFINED:
            self.known[node].zero_()
        return True

    def _concrete(self, node: fx.Node) -> Any:
        if node in self.known:
            return self.known[node]
        value = node.meta["val"]
        return torch.zeros(tuple(value.shape), dtype=value.dtype)

    def _expression(self, node: fx.Node) -> relax.Expr:
        if node not in self.importer.env:
            value = self.known[node]
            if isinstance(value, torch.Tensor):
                # A binding, not the bare constant: the importer computes on two constants itself, and not as torch.
                self.importer.env[node] = self.builder.emit(relax.const(value.contiguous().numpy()))
            else:
                self.importer.env[node] = value
        return self.importer.env[node]


_BY_SHAPE = frozenset(
    {
        torch.ops.aten.empty_like.default,
        torch.ops.aten.full_like.default,
        torch.ops.aten.ones_like.default,
        torch.ops.aten.zeros_like.default,
    }
)

# Their content is undefined until it is written over: any content is right, and zeros are the same every time.
_UNDEFINED = frozenset(
    {
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.empty_permuted.default,
        torch.ops.aten.empty_strided.default,
    }
)


def _pruned_name(targets: list[str]) -> str | None:
    """``conv.weight`` for ``conv.weight_orig`` and ``conv.weight_mask``, in either order."""
    stems = {target.removesuffix("_orig").removesuffix("_mask") for target in targets}
    if len(targets) == 2 and len(stems) == 1 and {t.rsplit("_", 1)[-1] for t in targets} == {"orig", "mask"}:
        return stems.pop()
    return None


def _drop_metadata_checks(program: ExportedProgram) -> None:
    """Asserts on data type and layout hold already: the shapes are static."""
    for node in list(program.graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.aten._assert_tensor_metadata.default:
            program.graph.erase_node(node)


def output_names(program: ExportedProgram) -> list[str]:
    """``output``, ``output_1``, ... for what a program returns by position, its keys for what it returns by name."""
    leaves = range(program.call_spec.out_spec.num_leaves)
    tree = pytree.tree_unflatten(list(leaves), program.call_spec.out_spec)
    specs = [spec for spec in program.graph_signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]
    names: list[str] = []
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        if isinstance(specs[leaf].arg, TensorArgument):
            names.append(_name_of_path(path, len(names)))
    return names


def _name_of_path(path: tuple[Any, ...], position: int) -> str:
    """A name for one leaf of the returned tree: keys joined, or its position."""
    keys = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    if not path or isinstance(path[0], pytree.SequenceKey):
        return f"output_{position}" if position else "output"
    return ".".join(keys)


def _value_of(spec: InputSpec, program: ExportedProgram) -> torch.Tensor:
    target = str(spec.target)
    return program.state_dict[target] if target in program.state_dict else program.constants[target]


def _refuse_side_effects(program: ExportedProgram, source: str) -> None:
    """A program that writes a buffer or an input would be another function on its second call."""
    for spec in program.graph_signature.output_specs:
        if spec.kind is OutputKind.USER_OUTPUT:
            if isinstance(spec.arg, TensorArgument) or getattr(spec.arg, "value", 0) is None:
                continue
            raise UnsupportedError(f"{source}: returns {spec.arg.name or 'a number'}, which is not a tensor")
        raise UnsupportedError(
            f"{source}: changes '{spec.target}' while it runs; Pumice compiles models without state, so remove the"
            " in-place update"
        )


def _refuse_data_types(program: ExportedProgram, source: str) -> None:
    """Pumice computes in float32 and integers: a float of another width would change its numbers silently."""
    allowed = {torch.float32, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dtype not in allowed and (node.users or node.op != "placeholder"):
            raise UnsupportedError(
                f"{source}: {place_of(node)} computes in {str(value.dtype).removeprefix('torch.')}, which is not"
                " supported; convert the model with .float() before it is exported"
            )
