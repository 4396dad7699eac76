"""The compile driver: a model file or live model through every stage to a library."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst, IRModule

from pumice.artifact import CompiledModel
from pumice.errors import UsageError
from pumice.evaluation import Metric
from pumice.export import write_onnx
from pumice.files import check_destination
from pumice.frontend import read_model
from pumice.module import inputs_of, layers_of, output_names_of, source_of, weights_of
from pumice.passes.calibrate import read_calibration
from pumice.passes.choose_kernel import Chooser, preview
from pumice.passes.evaluate import Evaluator
from pumice.passes.layers import find_layers
from pumice.passes.link_steps import link_steps
from pumice.passes.pipeline import LowerOptions, lower
from pumice.passes.prune_spec import PruneSpec
from pumice.passes.rewriting import bindings_of, op_name
from pumice.passes.simplify import SimplifyModel
from pumice.prepare import Masks, prepare
from pumice.recipe import Recipe, recipe_of
from pumice.schedules.measurements import Machine, read_measurements
from pumice.stages import Progress, Stages
from pumice.targets.isa import isa
from pumice.targets.library import build_code, write_library
from pumice.targets.nvcc import find_nvcc
from pumice.targets.target import Target
from pumice.targets.toolchain import find_toolchain
from pumice.threads import check_threads
from pumice.verify import make_check

# The targets whose choices ``inspect`` shows.
PREVIEWED = ("native", "x86-64-v4-vnni", "x86-64-v4", "x86-64-v3-avxvnni", "x86-64-v3", "armv8.2-a+dotprod", "armv8-a")


@dataclass(frozen=True)
class CompileOptions:
    """What the user decides; the manifest keeps it, so that a library says how it was made."""

    target: str = "native"
    recipe: Recipe = field(default_factory=Recipe)
    threads: int | None = None
    measure_errors: bool = True
    tuning_db: str | None = None  # the file's name, without its folder
    libc: str | None = None
    check: bool = True

    def to_json(self) -> dict[str, Any]:
        """A plain dict."""
        return {**{each.name: getattr(self, each.name) for each in fields(self)}, "recipe": self.recipe.to_json()}


def compile_model(
    model: Any,
    *,
    target: str = "native",
    inputs: Any = None,
    calibration: Mapping[str, np.ndarray] | str | Path | None = None,
    recipe: Recipe | str | Path | None = None,
    prune: str | PruneSpec | Sequence[str | PruneSpec] | None = None,
    masks: Masks | None = None,
    keep_float: Sequence[str] | None = None,
    float_budget: float | None = None,
    quantize: bool | None = None,
    calibration_method: str | None = None,
    permute: bool | None = None,
    reconstruct: int | None = None,
    reconstruct_whole: bool | None = None,
    smooth: float | str | None = None,
    equalize: bool | None = None,
    rounding: str | None = None,
    correct_bias: bool | None = None,
    measure_errors: bool = True,
    tuning_db: str | Path | None = None,
    threads: int | None = None,
    libc: str | None = None,
    check: bool = True,
    emit_onnx: str | Path | None = None,
    metric: Metric | None = None,
    progress: Progress | None = None,
) -> CompiledModel:
    """Compile a model into a library: ``.save(path)`` writes it, calling it runs it.

    ``model`` is the path of an .onnx or .pt2 file, an ``onnx.ModelProto`` or a ``torch.nn.Module``; ``inputs`` pins
    open shapes by name (for a live module it is the tuple of example inputs). ``calibration`` is one array an input
    (or a .npz file of them), cut along its first axis into pieces of the input's first dimension; quantizing needs it
    unless the model carries its scales already. ``masks`` are 0/1 arrays by weight name, or a .safetensors or .npz file
    of them.

    ``recipe`` (or its file) says what becomes of the numbers; the arguments named like its fields, where they are not
    None, take the place of these: ``prune``, a specification such as ``magnitude:1x4:0.9`` or several; ``permute``;
    ``reconstruct``; ``reconstruct_whole``; ``keep_float``, the layers, by name pattern, that stay float32;
    ``float_budget``, the share of the multiply-adds that may stay float32 where int8 does the most harm; ``quantize``;
    ``calibration_method``; ``smooth``; ``equalize``; ``rounding``; ``correct_bias``. ``measure_errors`` gives the
    report each layer's errors, by the calibration data.

    ``tuning_db`` is a file of ``pumice tune``, whose times decide on the kernels of the layers that it has; ``threads``
    is what the library runs on by default (None: one for each core). ``libc`` is the box's C library: ``glibc-2.28``
    (any version), ``musl``, or None, the one that this system's compiler links against. ``check`` stores the first
    calibration sample (without any, seeded noise) in the library, with a checksum of what every kernel makes of it, for
    ``pumice verify``. ``emit_onnx`` is where the pruned and quantized model is written too, as ONNX for other runtimes.
    ``metric`` is measured of the model as it was read and of what it became, both on this machine whatever the target,
    and the manifest says both.

    Raises UsageError, ModelError, UnsupportedError and MissingDependencyError as their docstrings say.
    """
    pool = check_threads(threads)
    chosen = recipe_of(recipe).but(
        prune=prune,
        keep_float=keep_float,
        float_budget=float_budget,
        quantize=quantize,
        calibration_method=calibration_method,
        permute=permute,
        reconstruct=reconstruct,
        reconstruct_whole=reconstruct_whole,
        smooth=smooth,
        equalize=equalize,
        rounding=rounding,
        correct_bias=correct_bias,
    )
    database = Path(tuning_db).name if tuning_db else None
    options = CompileOptions(target, chosen, threads, measure_errors, database, libc, check)
    if emit_onnx is not None:
        check_destination(emit_onnx)
    device = Target.parse(target)
    find_toolchain(device, libc)  # asked before a long compilation, not after
    if device.runs_on_gpu:
        find_nvcc()
    chooser = _chooser(tuning_db, Machine.of(device, pool))
    stage = Stages(progress)
    with stage("read the model"):
        original = read_model(model, inputs)
    samples = samples_of(calibration, original)
    mod = prepare(original, chosen, samples, masks, stage, measure_errors)
    manifest = _describe(mod, device, options, model)
    if metric is not None:
        manifest["accuracy"] = _accuracy(original, mod, metric, stage)
    if emit_onnx is not None:
        with stage("write the ONNX model"):
            write_onnx(mod, emit_onnx, chosen.to_json())
    with stage(f"lower for {device.name}"):
        lowering = LowerOptions(pool, chooser)
        lowered = lower(mod, device, lowering)
        plan = link_steps(lowered)
    manifest["layers"] = [_finite(layer.to_json()) for layer in layers_of(lowered).values()]
    owner = TemporaryDirectory(prefix="pumice-")
    path = Path(owner.name, "model.so")
    with stage("generate code"):
        code = build_code(plan, device)
    stored = None
    if check:
        with stage("take the checksums"):
            stored = make_check(mod, device, lowering, plan, code, samples)
    with stage("link"):
        write_library(plan, device, manifest, path, libc, stored, code)
    return CompiledModel(path, threads, owner)


def _chooser(tuning_db: str | Path | None, machine: Machine) -> Chooser:
    """By the times in the file, which may be of another CPU: the report then says of which."""
    if tuning_db is None:
        return Chooser()
    measured = read_measurements(tuning_db, machine)
    return Chooser(measured=measured, where="here" if measured.machine == machine else f"on {measured.machine.cpu}")


def _accuracy(original: IRModule, mod: IRModule, metric: Metric, stage: Stages) -> dict[str, dict[str, float | None]]:
    """Each number of the metric, before and after."""
    with stage("evaluate the model as it was"):
        before = metric(Evaluator(tvm.transform.Sequential([SimplifyModel()])(original)).run)
    with stage("evaluate what it became"):
        after = metric(Evaluator(mod).run)
    return {name: {"before": before.get(name), "after": value} for name, value in after.items()}


def inspect_model(model: Any, inputs: Any = None, masks: Masks | None = None) -> dict[str, Any]:
    """What a model holds before compilation, in the form of a manifest without a target."""
    mod = prepare(read_model(model, inputs), Recipe(quantize=False), None, masks, Stages(None))
    layers = [_finite(layer.to_json()) for layer in layers_of(mod).values()]
    return {"source": _source(mod, model), **_signature(mod), "layers": layers, "targets": _previews(mod)}


def _previews(mod: IRModule) -> list[dict[str, Any]]:
    """What each target would do with each layer in int8: the kernel and the reason."""
    weights = weights_of(mod)
    found = [(layer, weights[layer.weight.name]) for layer in find_layers(mod) if layer.weight.name in weights]
    previews = []
    for name in PREVIEWED:
        device = Target.parse(name)
        choices = {layer.name: preview(layer, weight, isa(device.isa)) for layer, weight in found}
        layers = {layer: {"kernel": choice.kernel, "reason": choice.reason} for layer, choice in choices.items()}
        previews.append({"name": name, "isa": device.isa, "layers": layers})
    return previews


def samples_of(
    calibration: Mapping[str, np.ndarray] | str | Path | None, mod: IRModule
) -> Mapping[str, np.ndarray] | None:
    """Calibration data as the user gives it, a file or arrays, as arrays."""
    if isinstance(calibration, str | Path):
        return read_calibration(calibration, mod)
    if calibration is not None and not isinstance(calibration, Mapping):
        raise UsageError(
            f"{source_of(mod)}: the calibration data is of type {type(calibration).__name__}; give a .npz file or a "
            "dict of arrays by input name"
        )
    return calibration


def _describe(mod: IRModule, device: Target, options: CompileOptions, model: Any) -> dict[str, Any]:
    """The manifest, but for the layers, whose kernels lowering chooses."""
    return {
        "source": _source(mod, model),
        "target": {
            "name": device.name,
            "tvm": str(device.tvm),
            "architecture": device.architecture,
            "isa": device.isa,
            "features": sorted(device.features),
            "gpus": list(device.gpus),
        },
        **_signature(mod),
        "options": options.to_json(),
        "threads": options.threads,
        "versions": {"pumice": version("pumice"), "tvm": str(tvm.__version__)},
    }


def _source(mod: IRModule, model: Any) -> dict[str, Any]:
    path = Path(model) if isinstance(model, str | Path) else None
    return {"file": source_of(mod), "sha256": hashlib.sha256(path.read_bytes()).hexdigest() if path else None}


def _signature(mod: IRModule) -> dict[str, Any]:
    """Inputs and outputs: names, shapes, data types, and the scale that each is rounded to bytes by, where it is."""
    body = mod["main"].body.body
    outputs = list(body.fields) if isinstance(body, relax.Tuple) else [body]
    scales: dict[relax.Expr, dict[str, Any]] = {}
    for var, value in bindings_of(mod):
        if op_name(value) in ("relax.quantize", "relax.dequantize"):
            scale, zero_point = value.args[1:3]
            if isinstance(scale, GenericConst) and not scale.ty.shape:
                tensor = value.args[0] if op_name(value) == "relax.quantize" else var
                numbers = {"scale": float(scale.value.numpy()), "zero_point": int(zero_point.value.numpy())}
                scales.setdefault(tensor, numbers)
    return {
        "inputs": [_tensor(str(var.name), var, scales) for var in inputs_of(mod)],
        "outputs": [_tensor(name, var, scales) for name, var in zip(output_names_of(mod), outputs, strict=True)],
    }


def _tensor(name: str, tensor: relax.Expr, scales: Mapping[relax.Expr, dict[str, Any]]) -> dict[str, Any]:
    ty = tensor.ty
    shape = [int(size) for size in ty.shape]
    return {"name": name, "shape": shape, "dtype": str(ty.dtype), **scales.get(tensor, {})}


def _finite(entry: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: the ratio of a layer without any error is left out."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in entry.items()
    }
