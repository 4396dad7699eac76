"""Run a module form on this machine with TVM's own pipeline: what tests compare everything else with."""

from collections.abc import Mapping

import numpy as np
import tvm
from tvm import relax
from tvm.ir import IRModule

from pumice.module import inputs_of, weight_vars_of, weights_of
from pumice.passes.evaluate import Evaluator
from pumice.passes.simplify import SimplifyModel


def random_feed(mod: IRModule, count: int = 1, seed: int = 0, below: int = 2) -> dict[str, np.ndarray]:
    """``count`` samples for each input of ``main``: normal floats, integers from 0 to ``below - 1``."""
    draw, found = np.random.default_rng(seed), {}
    for var in inputs_of(mod):
        shape, dtype = [count, *(int(size) for size in tuple(var.ty.shape)[1:])], str(var.ty.dtype)
        values = draw.standard_normal(shape) if "float" in dtype else draw.integers(0, below, shape)
        found[str(var.name)] = np.asarray(values, dtype)
    return found


def run_compiled(mod: IRModule, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs of ``main`` as they are compiled for real: simplified, lowered to Pumice's kernels, built."""
    return list(Evaluator(SimplifyModel()(mod)).run(inputs).values())


def run_module(mod: IRModule, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs of ``main`` on ``inputs`` (by name), weights taken from the module; TVM's default pipeline."""
    # opt-level 1: the modules are small and run once, so LLVM's time counts and their speed does not.
    target = tvm.target.Target({"kind": "llvm", "opt-level": 1})
    weights = weights_of(mod)
    arguments = [inputs[var.name] for var in inputs_of(mod)] + [weights[var.name] for var in weight_vars_of(mod)]
    # reshape: ascontiguousarray turns a scalar into a vector.
    tensors = [tvm.runtime.tensor(np.ascontiguousarray(array).reshape(array.shape)) for array in arguments]
    results = relax.VirtualMachine(relax.build(mod, target), tvm.cpu())["main"](*tensors)
    return [result.numpy() for result in ([results] if isinstance(results, tvm.runtime.Tensor) else results)]
