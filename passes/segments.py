"""Cutting ``main`` into blocks that follow one another, where a single activation is live.

    x -> [conv relu conv add relu] -> [conv relu conv add relu] -> [mean fc] -> y

A cut is a place between two layers where of all that was computed from layers so far, only one tensor is still read:
the end of a residual block, of an attention, of a feed-forward part. What depends on no layer (an embedding, a mask
made of an input) may cross a cut, for it is the same whatever is done to the layers, unless layers read it.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import relax
from tvm.ir import IRModule

from pumice.passes.dataflow import Dataflow, operands
from pumice.passes.layers import Layer, find_layers
from pumice.passes.rewriting import is_tensor

Binding = tuple[relax.Var, relax.Expr]


@dataclass(frozen=True)
class Segment:
    """A piece of ``main``: consecutive bindings, all of which depend on a layer."""

    bindings: tuple[Binding, ...]
    live_in: tuple[relax.Var, ...]  # the cut before it (but for the first segment), then values that no layer made
    live_out: tuple[relax.Var, ...]  # the cut after it (but for the last segment), then outputs of the model
    layers: tuple[Layer, ...]

    @property
    def name(self) -> str:
        """For messages: its layers, the first and the last."""
        names = [layer.name for layer in self.layers]
        return names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"


def segments(mod: IRModule, least: int = 1) -> list[Segment]:
    """The segments of a module in the canonical layer form, in execution order, each with at least ``least`` layers.

    The cut between two layers comes as late as it can, so that bias and activation belong to the layer before. A
    graph without a cut is one segment, one without layers none. Raises UnsupportedError as ``Dataflow`` does.
    """
    flow = Dataflow(mod)
    layers = _observed_layers(mod, flow)
    bindings = _dependent(flow, set(layers))
    pieces: list[list[Binding]] = []
    start = 0
    for end in [*_cuts(bindings, layers), len(bindings)]:
        piece = bindings[start:end]
        count = sum(var in layers for var, _ in piece)
        if count >= max(1, least):
            pieces.append(piece)
            start = end
        elif end == len(bindings) and piece:
            pieces = [*pieces[:-1], (pieces[-1] if pieces else []) + piece]
    return [_segment(piece, bindings, flow, layers) for piece in pieces]


def independent(mod: IRModule) -> list[Binding]:
    """The bindings that depend on no layer: they compute, from the model's inputs, the rest of ``live_in``."""
    flow = Dataflow(mod)
    dependent = {var for var, _ in _dependent(flow, set(_observed_layers(mod, flow)))}
    return [(var, value) for var, value in flow.bindings if var not in dependent and not _names_results(var, flow)]


def _observed_layers(mod: IRModule, flow: Dataflow) -> dict[relax.Var, Layer]:
    """The layers that read an activation, by variable."""
    return {layer.var: layer for layer in find_layers(mod) if layer.data in flow.activations}


def _dependent(flow: Dataflow, layers: set[relax.Var]) -> list[Binding]:
    """The bindings that compute or read what a layer gave."""
    reached: set[relax.Var] = set()
    found = []
    for var, value in flow.bindings:
        if not _names_results(var, flow) and (var in layers or not reached.isdisjoint(operands(value))):
            reached.add(var)
            found.append((var, value))
    return found


def _names_results(var: relax.Var, flow: Dataflow) -> bool:
    """Whether a binding only gives a name to what ``main`` returns."""
    return var in flow.outputs and isinstance(flow.value[var], relax.Tuple | relax.Var)


def _cuts(bindings: list[Binding], layers: dict[relax.Var, Layer]) -> list[int]:
    """Where to cut: numbers of bindings that come before, at most one between any two layers.

    What layers read is live from its first reader on, whether or not a layer made it: the embedding that an encoder
    starts from is part of its residual stream.
    """
    first_read: dict[relax.Var, int] = {}
    last_read: dict[relax.Var, int] = {}
    for i, (_, value) in enumerate(bindings):
        for operand in operands(value):
            first_read.setdefault(operand, i)
            last_read[operand] = i
    made = {var: i for i, (var, _) in enumerate(bindings)}
    starts = {layer.data: first_read[layer.data] for layer in layers.values()} | made
    born: list[list[relax.Var]] = [[] for _ in bindings]
    for var, i in starts.items():
        born[i].append(var)
    live: set[relax.Var] = set()
    cuts: list[int] = []
    latest = None
    for i, (var, _) in enumerate(bindings):
        if var in layers and latest is not None:
            cuts.append(latest)
            latest = None
        live = {v for v in [*live, *born[i]] if last_read.get(v, -1) > i}
        if len(live) == 1 and live <= made.keys() and all(is_tensor(v) for v in live):
            latest = i + 1
    return cuts


def _segment(piece: list[Binding], bindings: list[Binding], flow: Dataflow, layers: dict[relax.Var, Layer]) -> Segment:
    made = {var for var, _ in piece}
    dependent = {var for var, _ in bindings}
    read = dict.fromkeys(v for _, value in piece for v in operands(value) if v in flow.activations and v not in made)
    read_elsewhere = {v for var, value in bindings if var not in made for v in operands(value)}
    return Segment(
        tuple(piece),
        tuple(sorted(read, key=lambda v: v not in dependent)),
        tuple(var for var, _ in piece if var in read_elsewhere or var in flow.outputs),
        tuple(layers[var] for var, _ in piece if var in layers),
    )
