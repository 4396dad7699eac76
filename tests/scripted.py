"""Modules written as TVMScript, with weights: what tests of graph passes start from."""

from typing import Any

import numpy as np
import tvm
from running import run_module
from tvm import relax
from tvm.ir import IRModule

from pumice.module import inputs_of, weight_vars_of, with_output_names, with_source, with_weights


def scripted(mod: IRModule, **values: Any) -> IRModule:
    """``mod`` with weights: ``values`` by name, the rest random. ``conv__weight`` in the script is ``conv.weight``."""
    generator = np.random.default_rng(7)
    main = mod["main"]
    weights, renamed = {}, {}
    for var in weight_vars_of(mod):
        shape, dtype = [int(d) for d in var.ty.shape], str(var.ty.dtype)
        value = values.pop(var.name, None)
        if value is None:
            value = generator.standard_normal(shape) if "float" in dtype else generator.integers(-9, 9, shape)
        name = var.name.replace("__", ".")
        weights[name] = np.asarray(value, dtype).reshape(shape)
        renamed[var] = relax.Var(name, var.ty)
    assert not values, f"no such weights: {sorted(values)}"
    mod = mod.clone()
    mod.update_func(mod.get_global_var("main"), _renamed(main, renamed))
    return with_output_names(with_source(with_weights(mod, weights), "scripted"), ["y"])


def _renamed(function: relax.Function, renamed: dict[relax.Var, relax.Var]) -> relax.Function:
    @relax.expr_functor.mutator
    class Rename(relax.PyExprMutator):
        def visit_var_(self, op: relax.Var) -> relax.Expr:
            return renamed.get(op, op)

    body = Rename().visit_expr(function.body)
    params = [renamed.get(p, p) for p in function.params]
    return relax.Function(params, body, function.ret_ty, function.is_pure, function.attrs)


def assert_rewrites(before: IRModule, expected: IRModule, rewrite: tvm.transform.Pass) -> IRModule:
    """``rewrite(before)`` has the body of ``expected``, and twice over it has it still; gives the rewritten module."""
    after = rewrite(before)
    tvm.ir.assert_structural_equal(after["main"], _normal(expected)["main"], map_free_vars=True)
    again = rewrite(after)
    tvm.ir.assert_structural_equal(again["main"], after["main"], map_free_vars=True)
    return after


def assert_same_numbers(before: IRModule, after: IRModule, rtol: float = 1e-5, seed: int = 3) -> None:
    """Both modules, run by TVM, give the same outputs on random inputs."""
    generator = np.random.default_rng(seed)
    inputs = {}
    for var in inputs_of(before):
        shape, dtype = [int(d) for d in var.ty.shape], str(var.ty.dtype)
        inputs[var.name] = np.asarray(generator.standard_normal(shape) * 2).astype(dtype)
    for a, b in zip(run_module(before, inputs), run_module(after, inputs), strict=True):
        np.testing.assert_allclose(b, a, rtol=rtol, atol=rtol * max(1.0, float(np.abs(a).max())))


def _normal(mod: IRModule) -> IRModule:
    return relax.transform.Normalize()(mod)


def bindings(mod: IRModule) -> list[str]:
    """The operators of ``main`` in order, as ``matmul``, ``nn.relu``."""
    found = []
    for block in mod["main"].body.blocks:
        for binding in block.bindings:
            value = binding.value
            name = value.op.name if isinstance(value, relax.Call) else type(value).__name__
            found.append(str(name).removeprefix("relax."))
    return found
