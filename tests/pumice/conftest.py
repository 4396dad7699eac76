import numpy as np
import onnx
import pytest
from tiny import tiny_onnx

import pumice

SHAPE = (1, 1, 8, 8)


@pytest.fixture(scope="session")
def samples():
    return np.random.default_rng(1).random((16, *SHAPE[1:]), dtype=np.float32)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.onnx"
    onnx.save(tiny_onnx(zero=0.8), path)
    return path


@pytest.fixture(scope="session")
def calibration_path(tmp_path_factory, samples):
    path = tmp_path_factory.mktemp("calibration") / "images.npz"
    np.savez(path, image=samples)
    return path


@pytest.fixture(scope="session")
def compiled(model_path, samples):
    return pumice.compile(model_path, inputs={"image": SHAPE}, calibration={"image": samples})


@pytest.fixture(scope="session")
def library(tmp_path_factory, compiled):
    path = tmp_path_factory.mktemp("compiled") / "tiny.so"
    compiled.save(path)
    return path


@pytest.fixture
def altered(library, tmp_path):
    """The library with a piece of its manifest replaced by another of the same length."""

    def alter(old: str, new: str):
        assert len(old) == len(new)
        content = library.read_bytes()
        assert old.encode() in content
        path = tmp_path / "altered.so"
        path.write_bytes(content.replace(old.encode(), new.encode()))
        return path

    return alter
