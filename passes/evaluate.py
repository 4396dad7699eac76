"""Running a module form on this machine, float or quantized: what calibration and error measurement stand on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import tvm
from tvm import relax
from tvm.ir import IRModule

from pumice.errors import ModelError, UnsupportedError
from pumice.module import inputs_of, output_names_of, source_of, weight_vars_of, weights_of
from pumice.passes.rewriting import Rewriter, dtype_of, op_name, rewrite


def build(mod: IRModule) -> relax.VMExecutable:
    """Compile ``main(inputs..., weights...)`` for this CPU, with float layers computed by numpy's matrix product.

    TVM's own float convolution, unscheduled, would make calibration take a hundred times longer. ``R.quantize``
    lowers to ``llvm.nearbyint``: half to even, which is the definition.
    """
    return tvm.compile(rewrite(mod, _call_numpy), target=tvm.target.Target("llvm"))


class Evaluator:
    """A compiled module; ``run`` gives its outputs, ``observe`` the values of the tapped variables."""

    def __init__(self, mod: IRModule, taps: Sequence[relax.Var] = ()) -> None:
        """Compile ``mod``; ``taps`` are variables of its ``main``.

        Raises:
            UnsupportedError: an operator that cannot be compiled.
        """
        self._source = source_of(mod)
        self._inputs = inputs_of(mod)
        self._output_names = output_names_of(mod)
        self._taps = list(dict.fromkeys(taps))
        weights = weights_of(mod)
        self._weights = [tvm.runtime.tensor(weights[var.name]) for var in weight_vars_of(mod)]
        try:
            executable = build(_with_taps(mod, self._taps))
        except (tvm.error.TVMError, TypeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise UnsupportedError(f"{self._source}: cannot be evaluated on this machine: {reason}") from error
        self._main = relax.VirtualMachine(executable, tvm.cpu())["main"]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The model's outputs by name, for arrays by input name."""
        values = self._call(inputs)[: len(self._output_names)]
        return dict(zip(self._output_names, values, strict=True))

    def observe(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The values of the tapped variables, in the order in which they were given."""
        return self._call(inputs)[len(self._output_names) :]

    def _call(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        missing = [var.name for var in self._inputs if var.name not in inputs]
        if missing:
            raise ModelError(f"{self._source}: no array for input {missing[0]!r}; its inputs are {self._names()}")
        # reshape: ascontiguousarray turns a scalar into a vector.
        arrays = [np.asarray(inputs[var.name], dtype=str(var.ty.dtype)) for var in self._inputs]
        arguments = [tvm.runtime.tensor(np.ascontiguousarray(array).reshape(array.shape)) for array in arrays]
        return [value.numpy() for value in self._main(*arguments, *self._weights)]

    def _names(self) -> str:
        return ", ".join(repr(var.name) for var in self._inputs)


def _with_taps(mod: IRModule, taps: Sequence[relax.Var]) -> IRModule:
    """``main`` returning one flat tuple: its outputs, then the taps."""
    main = mod["main"]
    *before, last = main.body.blocks
    returned = main.body.body
    bound = {binding.var: binding.value for block in main.body.blocks for binding in block.bindings}
    if isinstance(returned, relax.Tuple):
        outputs = list(returned.fields)
    elif isinstance(returned.ty, relax.TupleType):
        outputs = list(bound[returned].fields)
    else:
        outputs = [returned]
    everything = relax.Tuple([*outputs, *taps])
    result = relax.Var("values", relax.TupleType([field.ty for field in everything.fields]))
    block = relax.DataflowBlock([*last.bindings, relax.VarBinding(result, everything)])
    body = relax.SeqExpr([*before, block], result)
    func = relax.Function(main.params, body, result.ty, main.is_pure, main.attrs)
    functions = dict(mod.functions.items())
    functions[mod.get_global_var("main")] = func
    return IRModule(functions)


def _call_numpy(rewriter: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
    """``matmul(a, b) -> numpy``, ``nn.conv2d(x NCHW, w OIHW) -> numpy``, in float32."""
    name = op_name(value)
    if name not in _NUMPY or any(dtype_of(tensor) != "float32" for tensor in [var, *value.args]):
        return None
    if name == "relax.matmul":
        numbers = []
    elif (value.attrs.data_layout, value.attrs.kernel_layout) == ("NCHW", "OIHW"):
        attrs = value.attrs
        numbers = [*attrs.strides, *attrs.padding, *attrs.dilation, attrs.groups]
    else:
        return None
    shape = relax.ShapeExpr([int(number) for number in numbers])
    return relax.op.call_dps_packed(_NUMPY[name], [*value.args, shape], out_ty=var.ty)


def _matmul(a: tvm.runtime.Tensor, b: tvm.runtime.Tensor, _: tvm.runtime.ShapeTuple, out: tvm.runtime.Tensor) -> None:
    with np.errstate(all="ignore"):  # what overflows is reported where it is looked at
        np.matmul(np.from_dlpack(a), np.from_dlpack(b), out=np.from_dlpack(out))


def _conv2d(
    x: tvm.runtime.Tensor, w: tvm.runtime.Tensor, numbers: tvm.runtime.ShapeTuple, out: tvm.runtime.Tensor
) -> None:
    """One matrix product for each kernel position, summed."""
    sy, sx, top, left, bottom, right, dy, dx, groups = (int(number) for number in numbers)
    weight, result = np.from_dlpack(w), np.from_dlpack(out)
    n, channels, kh, kw = weight.shape
    batch, _, oh, ow = result.shape
    padded = np.pad(np.from_dlpack(x), ((0, 0), (0, 0), (top, bottom), (left, right)))
    weight = weight.reshape(groups, n // groups, channels, kh, kw)
    total = np.zeros((batch, groups, n // groups, oh * ow), np.float32)
    product = np.multiply if channels == 1 else np.matmul  # the same for a depthwise convolution, and quicker
    for i in range(kh):
        for j in range(kw):
            seen = padded[:, :, i * dy : i * dy + sy * (oh - 1) + 1 : sy, j * dx : j * dx + sx * (ow - 1) + 1 : sx]
            with np.errstate(all="ignore"):
                total += product(weight[:, :, :, i, j], seen.reshape(batch, groups, channels, oh * ow))
    result[...] = total.reshape(result.shape)


_NUMPY = {"relax.matmul": "pumice.evaluate.matmul", "relax.nn.conv2d": "pumice.evaluate.conv2d"}
tvm.register_global_func("pumice.evaluate.matmul", _matmul, override=True)
tvm.register_global_func("pumice.evaluate.conv2d", _conv2d, override=True)
