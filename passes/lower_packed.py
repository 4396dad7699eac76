"""The pass that turns Relax operators into Pumice's kernels on packed activations.

    x -> quantize -> dequantize -> conv2d(., dequantize(w)) -> add(bias) -> relu -> quantize -> dequantize -> ...

    ==>  x_p = call_tir(pack, x);  y_p = call_tir(layer_conv1, x_p, blocks, offsets, bias, multiplier);  ...

A value that a kernel made stays packed for as long as its readers can use that: layers, pooling, residual adds,
concat, tables of one variable. What has no packed form is computed by Relax's own operator on an unpacked tensor.
"""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.ir import IRModule

from pumice.module import layers_of, weights_of, with_layers, with_weights
from pumice.passes.choose_kernel import Chooser
from pumice.passes.fusion import Graph, fuse
from pumice.passes.lower_layer import lower_layer
from pumice.passes.lower_operators import OPERATORS
from pumice.passes.packed import Builder
from pumice.passes.placement import plan_geometry
from pumice.targets.target import Target


@tvm.transform.module_pass(opt_level=0, name="LowerPacked")
class LowerPacked:
    """Replace layers and what runs between them by packed kernels for ``target``.

    Args:
        target: the device.
        threads: how many threads the library will use at most; 1 leaves parallel loops out.
        chooser: decides on the form of each layer's weight.
    """

    def __init__(self, target: Target, threads: int = 1, chooser: Chooser | None = None) -> None:
        self.target = target
        self.threads = threads
        self.chooser = chooser or Chooser()

    def transform_module(self, mod: IRModule, ctx: tvm.transform.PassContext) -> IRModule:
        """The module with kernels called by ``call_tir``, and with each layer's kernel in its record."""
        graph = Graph(mod)
        chains = fuse(graph)
        builder = Builder(graph, plan_geometry(graph, chains), self.target, self.threads, layers_of(mod), self.chooser)
        results = {chain.result: chain for chain in chains}
        inside = {var for chain in chains for var in chain.members} - set(results)
        for var, value in graph.flow.bindings:
            if var in inside or builder.is_known(var):
                continue
            if var not in results:
                _lower_binding(builder, var, value)
            elif not lower_layer(builder, results[var]):
                for member in results[var].members:  # a rule may make a later one along with its own
                    if builder.is_known(member):
                        continue
                    _lower_binding(builder, member, graph.flow.value[member])
        return _finish(mod, builder)


def _lower_binding(builder: Builder, var: relax.Var, value: relax.Expr) -> None:
    rule = OPERATORS.get(builder.graph.flow.op(var))
    if rule is None or not rule(builder, var, value):
        builder.keep(var, value)


def _finish(mod: IRModule, builder: Builder) -> IRModule:
    """Main and the kernels as one module."""
    main = mod["main"]
    body = builder.outputs(main.body.body)
    params = [*builder.graph.flow.inputs, *builder.parameters()]
    sequence = relax.SeqExpr([relax.DataflowBlock(builder.bindings)], body)
    function = relax.Function(params, sequence, main.ret_ty, main.is_pure, main.attrs)
    if not (main.attrs and "global_symbol" in main.attrs):  # without it TVM's passes think that nobody calls it
        function = function.with_attr("global_symbol", "main")
    out = mod.clone()
    for name, kernel in builder.kernels():
        out.update_func(name, kernel)
    out.update_func(out.get_global_var("main"), relax.BlockBuilder().normalize(function))
    out = with_weights(out, builder.weights(weights_of(mod)))
    return with_layers(out, builder.records)
