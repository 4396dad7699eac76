"""The way in and the way out of the module form, for a Relax pipeline of one's own.

main(x) { conv2d(x, const) }   -- AdoptWeights ->   main(x, conv.weight) { conv2d(x, conv.weight) }
main(x, conv.weight) { ... }   -- BindWeights  ->   main(x) { ... const ... }
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst, IRModule

from pumice.errors import ModelError
from pumice.module import source_of, weights_of, with_weights
from pumice.passes.rewriting import Rewriter, rewrite


@tvm.transform.module_pass(opt_level=0, name="AdoptWeights")
class AdoptWeights:
    """Bring a plain Relax module into the module form that Pumice's passes take.

    Constants of ``main`` that are float32 or int8 tensors become named parameters: ``<variable>.weight`` where a
    layer reads them, ``<variable>.constant`` elsewhere.

    Args:
        parameters: the values of trailing parameters of ``main``, by name, as ``relax.frontend.detach_params`` gives
            them; every other parameter is an input.

    Raises ModelError where a value has no parameter, or an input would follow a weight.
    """

    def __init__(self, parameters: Mapping[str, np.ndarray] | None = None) -> None:
        self.parameters = dict(parameters or {})

    def transform_module(self, mod: IRModule, ctx: tvm.transform.PassContext) -> IRModule:
        """The module with its weights as parameters and their values attached."""
        names = [var.name for var in mod["main"].params]
        unknown = [name for name in self.parameters if name not in names]
        count = len(names) - len(self.parameters)
        if unknown or any(name in self.parameters for name in names[:count]):
            wrong = f"main has no parameter '{unknown[0]}'" if unknown else "an input of main follows a weight"
            raise ModelError(f"{source_of(mod)}: {wrong}; the weights must be the last parameters: {', '.join(names)}")
        mod = mod.clone()
        mod.update_func(mod.get_global_var("main"), mod["main"].with_attr("num_input", count))
        return rewrite(with_weights(mod, {**weights_of(mod), **self.parameters}), _adopt)


def _adopt(rewriter: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
    if not isinstance(value, relax.Call):
        return None
    kind = "weight" if rewriter.call(value, "nn.conv2d", "nn.conv1d", "matmul") is not None else "constant"

    def adopted(argument: relax.Expr) -> relax.Expr:
        array = rewriter.array(argument) if isinstance(argument, GenericConst) else None
        if array is None or str(array.dtype) not in ("float32", "int8") or array.ndim == 0:
            return argument
        return rewriter.weight(f"{var.name}.{kind}", array)

    return relax.Call(value.op, [adopted(argument) for argument in value.args], value.attrs, value.ty_args)


@tvm.transform.module_pass(opt_level=0, name="BindWeights")
class BindWeights:
    """Make the weights constants of ``main`` again, which then takes its inputs alone."""

    def transform_module(self, mod: IRModule, ctx: tvm.transform.PassContext) -> IRModule:
        """The module with ``main(inputs...)``."""
        main = mod["main"].without_attr("num_input") if "num_input" in mod["main"].attrs else mod["main"]
        mod = mod.clone()
        mod.update_func(mod.get_global_var("main"), main)
        values = {name: tvm.runtime.tensor(array) for name, array in weights_of(mod).items()}
        return relax.transform.BindParams("main", values)(mod)
