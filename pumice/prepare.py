"""The part of the road that no device decides: what a recipe makes of a model's numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import IRModule

from pumice.errors import UsageError
from pumice.frontend.masks import apply_masks, read_masks
from pumice.module import layers_of, source_of
from pumice.passes.calibrate import Calibrate
from pumice.passes.check_zeros import NoPrunedWeightCameBack
from pumice.passes.correct_bias import CorrectBias
from pumice.passes.dataflow import Dataflow
from pumice.passes.equalize import EqualizeChannels
from pumice.passes.evaluate import SharedEvaluator
from pumice.passes.keep_float import within_budget
from pumice.passes.layer_error import RecordLayerErrors, layer_results
from pumice.passes.layers import find_layers
from pumice.passes.permute_channels import PermuteChannels
from pumice.passes.prune import Prune
from pumice.passes.prune_spec import Filters, PruneSpec
from pumice.passes.quantization_plan import QuantizeSpec, plan_quantization
from pumice.passes.quantize import Quantize
from pumice.passes.reconstruct import Reconstruct, ReconstructSpec
from pumice.passes.remove_filters import RemoveFilters
from pumice.passes.remove_heads import RemoveHeads
from pumice.passes.round_weights import RoundWeights
from pumice.passes.simplify import SimplifyModel
from pumice.passes.smooth_activations import SmoothActivations
from pumice.passes.sparsity import RecordLayers
from pumice.passes.split_errors import SplitErrors
from pumice.recipe import Recipe
from pumice.stages import Stages

# A file of 0/1 arrays by weight name, or the arrays.
Masks = str | Path | Mapping[str, np.ndarray]
Samples = Mapping[str, np.ndarray]

_ERROR_MACS = 8_000_000_000  # multiply-adds spent on measuring what quantization cost


def prepare(
    mod: IRModule,
    recipe: Recipe,
    calibration: Samples | None,
    masks: Masks | None,
    stage: Stages,
    measure_errors: bool = False,
) -> IRModule:
    """``mod`` as it was read, simplified, masked, pruned and quantized as the recipe says.

    ``measure_errors`` writes the error of each layer into its record. Raises UsageError where calibration data are
    needed and missing, and what the passes raise.
    """
    if masks is not None:
        with stage("apply masks"):  # in the source's own shapes, so before anything is transposed
            if isinstance(masks, str | Path):
                mod = apply_masks(mod, read_masks(masks), f"side file {Path(masks).name}")
            else:
                mod = apply_masks(mod, masks, "masks given in Python")
    with tvm.transform.PassContext(opt_level=3, instruments=[NoPrunedWeightCameBack()]):
        with stage("simplify"):
            mod = _apply(mod, SimplifyModel(), RecordLayers())
        mod = _pruned(mod, recipe, calibration, stage, measure_errors)
        return _quantized(mod, recipe, calibration, stage, measure_errors) if recipe.quantize else mod


def removing(spec: PruneSpec, calibration: Samples | None) -> RemoveFilters | RemoveHeads:
    """The pass that carries out a specification that removes."""
    return (RemoveFilters if isinstance(spec, Filters) else RemoveHeads)(spec, calibration)


def _pruned(
    mod: IRModule, recipe: Recipe, calibration: Samples | None, stage: Stages, measure_errors: bool
) -> IRModule:
    zeroing = recipe.zeroing
    if recipe.reconstruct_whole and not recipe.reconstruct:
        raise UsageError(
            "reconstruction of the whole network has no number of steps: give --reconstruct (reconstruct=) too"
        )
    if recipe.reconstruct and not zeroing:
        raise UsageError(
            "reconstruction makes good for what pruning makes zero, and nothing is pruned here but by masks, filters "
            "or heads; give --prune (prune=), or leave --reconstruct (reconstruct=) out"
        )
    for removal in recipe.removals:
        with stage(f"remove {removal}"):
            mod = _apply(mod, removing(removal, calibration))
    if recipe.permute:
        with stage("order channels"):
            # Zeros that are there already are gathered in the blocks that kernels skip.
            order = PermuteChannels(zeroing, calibration) if zeroing else PermuteChannels(pattern="1x4")
            mod = _apply(mod, order)
    dense = mod  # of the final shapes and order, so that the pruned one can be compared with it
    for spec in zeroing:
        with stage(f"prune {spec}"):
            mod = _apply(mod, Prune(spec, calibration))
    if recipe.reconstruct:
        options = ReconstructSpec(recipe.reconstruct, int8=recipe.quantize, whole=recipe.reconstruct_whole)
        if calibration is None:
            raise _no_calibration(mod, "reconstruction trains on", "leave --reconstruct (reconstruct=) out")
        with stage(f"reconstruct blocks ({recipe.reconstruct} steps)"):
            mod = _apply(mod, Reconstruct(dense, calibration, options, QuantizeSpec(recipe.keep_float)))
    if zeroing and measure_errors and calibration is not None:
        with stage("measure what pruning did to each layer"):
            mod = _apply(mod, SplitErrors(dense, calibration))
    return mod


def _quantized(
    mod: IRModule, recipe: Recipe, calibration: Samples | None, stage: Stages, measure_errors: bool
) -> IRModule:
    spec = QuantizeSpec(recipe.keep_float)
    if calibration is None:
        if plan_quantization(mod, spec).layers:
            raise _no_calibration(mod, "quantizing to int8 needs", "give --no-quantize (quantize=False)")
        return _apply(mod, Quantize(spec))
    if recipe.smooth:
        with stage("smooth activations"):
            mod = _apply(mod, SmoothActivations(calibration, recipe.smooth))
    if recipe.equalize:
        with stage("equalize channels"):
            mod = _apply(mod, EqualizeChannels(calibration))
    original = mod
    evaluator = SharedEvaluator(original, _observed_later(original, recipe, measure_errors))
    if recipe.float_budget:
        with stage(f"choose layers that stay float (at most {recipe.float_budget:.0%} of the work)"):
            method, correct = recipe.calibration_method, recipe.correct_bias
            spec = within_budget(mod, calibration, recipe.float_budget, spec, method, correct, evaluator=evaluator)
    if recipe.rounding == "gptq":
        with stage("round weights (gptq)"):
            mod = _apply(mod, RoundWeights(calibration, spec))
    with stage(f"calibrate ({recipe.calibration_method})"):
        mod = _apply(mod, Calibrate(calibration, recipe.calibration_method, spec, evaluator=evaluator))
    with stage("quantize"):
        mod = _apply(mod, Quantize(spec))
    if recipe.correct_bias:
        with stage("correct biases"):
            mod = _apply(mod, CorrectBias(original, calibration, evaluator=evaluator))
    if not measure_errors:
        return mod
    with stage("measure the error of each layer"):
        errors = RecordLayerErrors(original, calibration, _error_samples(mod), evaluator)
        return _apply(mod, errors, SplitErrors(original, calibration, evaluator=evaluator))


def _no_calibration(mod: IRModule, why: str, otherwise: str) -> UsageError:
    return UsageError(
        f"{source_of(mod)}: {why} calibration data, one array an input with a few hundred samples; give "
        f"--calibration FILE.npz (calibration= in Python), or {otherwise}"
    )


def _observed_later(mod: IRModule, recipe: Recipe, measure_errors: bool) -> list[relax.Var]:
    """What the passes behind calibration observe of the float module."""
    computed, needed = Dataflow(mod).activations, recipe.correct_bias or measure_errors
    inputs = [layer.data for layer in find_layers(mod) if layer.data in computed] if needed else []
    return [*inputs, *(layer_results(mod).values() if measure_errors else [])]


def _error_samples(mod: IRModule) -> int:
    """How many samples the error of each layer is measured on: fewer for a large model, where one tells as much."""
    macs = sum(layer.macs for layer in layers_of(mod).values())
    return max(1, min(8, _ERROR_MACS // max(1, macs)))


def _apply(mod: IRModule, *passes: Any) -> IRModule:
    return tvm.transform.Sequential(list(passes))(mod)
