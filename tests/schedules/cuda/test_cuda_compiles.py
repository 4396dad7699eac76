"""NVIDIA's compiler takes the kernels, of every form, for every architecture that Pumice names."""

import numpy as np
import pytest
from cuda_kernels import Case

from pumice.errors import MissingDependencyError
from pumice.schedules.cuda.kernel import cuda_layer
from pumice.schedules.epilogue import Epilogue, Residual
from pumice.schedules.geometry import Window
from pumice.targets.cuda_source import cuda_source
from pumice.targets.nvcc import Nvcc, find_nvcc

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100")


@pytest.fixture(scope="module")
def nvcc() -> Nvcc:
    try:
        return find_nvcc()
    except MissingDependencyError as error:
        pytest.skip(str(error))


def source(every: int = 1) -> str:
    """Every form, int8 with a residual and an activation, and float32; with many positions and with one.

    Or only each ``every``-th of these.
    """
    rng, cases = np.random.default_rng(1), []
    for form in ("dense", "1x4", "2x4", "4x4"):
        for window, size in ((Window((3, 3), padding=(1, 1)), (9, 40)), (Window((1, 1)), (1, 1))):
            shape = (36, 30, *window.kernel)
            present = rng.random(shape) < 0.3
            x = rng.integers(0, 256, (1, 30, *size)).astype(np.uint8)
            residual = rng.integers(0, 256, (1, 36, *size)).astype(np.uint8)
            epilogue = Epilogue("uint8", Residual(0.5, 9), 3, 0, 255, "nn.silu", 0.1)
            weight = (rng.integers(-127, 128, shape) * present).astype(np.int8)
            cases.append(Case(x, weight, window, form, m=np.ones(36, np.float32), epilogue=epilogue, residual=residual))
            floats = (rng.standard_normal(shape) * present).astype(np.float32)
            anything = Epilogue("float32", None, 0, -np.inf, np.inf)
            cases.append(Case(x.astype(np.float32), floats, window, form, epilogue=anything))
    cases = cases[::every]
    for case in cases:
        case.prepare()
    return cuda_source({f"layer{i}": cuda_layer(case.work, f"layer{i}") for i, case in enumerate(cases)}).text


def test_for_one_architecture(nvcc):
    assert nvcc.cubins(source(every=5), ["sm_87"])["sm_87"].startswith(b"\x7fELF")


@pytest.mark.slow
def test_for_every_architecture(nvcc):
    assert set(nvcc.cubins(source(), ARCHITECTURES)) == set(ARCHITECTURES)
