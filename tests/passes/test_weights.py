import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R

from pumice.errors import ModelError
from pumice.module import inputs_of, layers_of, weights_of
from pumice.passes import AdoptWeights, BindWeights, Calibrate, Prune, Quantize, RecordLayers, SimplifyModel
from pumice.passes.link_steps import link_steps
from pumice.passes.pipeline import LowerOptions, lowering
from pumice.targets.executor import build_executor
from pumice.targets.target import Target

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((16, 8, 3, 3)).astype(np.float32)
BIAS = RNG.standard_normal((1, 16, 1, 1)).astype(np.float32)


@I.ir_module
class Detached:
    @R.function
    def main(
        x: R.Tensor((1, 8, 12, 12), "float32"),
        kernel: R.Tensor((16, 8, 3, 3), "float32"),
        bias: R.Tensor((1, 16, 1, 1), "float32"),
    ) -> R.Tensor((1, 16, 12, 12), "float32"):
        with R.dataflow():
            y = R.nn.conv2d(x, kernel, padding=(1, 1))
            z = R.add(y, bias)
            out = R.nn.relu(z)
            R.output(out)
        return out


def plain() -> tvm.IRModule:
    """A module as anybody has it: weights are constants."""
    values = {"kernel": tvm.runtime.tensor(WEIGHT), "bias": tvm.runtime.tensor(BIAS)}
    return relax.transform.BindParams("main", values)(Detached)


def run(mod: tvm.IRModule, x: np.ndarray) -> np.ndarray:
    executable = relax.build(mod, tvm.target.Target("llvm"))
    return relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(x)).numpy()


def test_constants_become_named_weights():
    mod = AdoptWeights()(plain())
    assert [var.name for var in inputs_of(mod)] == ["x"]
    weights = weights_of(mod)
    assert list(weights) == ["y.weight", "z.constant"]
    np.testing.assert_array_equal(weights["y.weight"], WEIGHT)


def test_detached_parameters_keep_their_names():
    mod = AdoptWeights({"kernel": WEIGHT, "bias": BIAS})(Detached)
    assert [var.name for var in inputs_of(mod)] == ["x"]
    assert set(weights_of(mod)) == {"kernel", "bias"}


def test_a_value_without_a_parameter_is_refused():
    with pytest.raises(ModelError, match="main has no parameter 'karnel'"):
        AdoptWeights({"karnel": WEIGHT})(Detached)
    with pytest.raises(ModelError, match="an input of main follows a weight"):
        AdoptWeights({"x": np.zeros((1, 8, 12, 12), np.float32)})(Detached)


def test_in_and_out_again_computes_the_same():
    x = RNG.standard_normal((1, 8, 12, 12)).astype(np.float32)
    there_and_back = tvm.transform.Sequential([AdoptWeights(), BindWeights()])(plain())
    assert len(there_and_back["main"].params) == 1
    np.testing.assert_array_equal(run(there_and_back, x), run(plain(), x))


def test_the_whole_road_in_a_pipeline_of_ones_own():
    samples = {"x": RNG.standard_normal((8, 8, 12, 12)).astype(np.float32)}
    target = Target.parse("native")
    front = [
        AdoptWeights(),
        SimplifyModel(),
        RecordLayers(),
        Prune("magnitude:1x4:0.5"),
        Calibrate(samples),
        Quantize(),
    ]
    pruned = tvm.transform.Sequential(front[:4])(plain())
    mod = tvm.transform.Sequential([*front[4:], lowering(target, LowerOptions())])(pruned)
    assert layers_of(mod)["y"].dtype == "int8"
    x = samples["x"][:1]
    executor = build_executor(link_steps(mod), target)
    executor.inputs[0][...] = x
    executor.run()
    got = executor.outputs[0]
    expected = run(BindWeights()(pruned), x)
    assert np.abs(got - expected).max() < 0.02 * np.abs(expected).max()
