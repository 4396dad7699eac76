import subprocess
import sys
import threading

import numpy as np
import onnxruntime
import pytest
from tiny import tiny_onnx

import pumice
from pumice.errors import ModelError, UnsupportedError, UsageError

SHAPE = (1, 1, 8, 8)


@pytest.fixture(scope="module")
def loaded(library):
    return pumice.load(library, threads=1)


@pytest.fixture
def image(samples):
    return samples[:1]


def test_float_equals_onnx_runtime(tmp_path, image):
    model = tiny_onnx()
    compiled = pumice.compile(model, inputs={"image": SHAPE}, quantize=False)
    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"image": image})[0]
    np.testing.assert_allclose(compiled(image=image)["logits"], expected, rtol=1e-5, atol=1e-5)
    compiled.save(tmp_path / "model.so")
    np.testing.assert_array_equal(pumice.load(tmp_path / "model.so")(image)["logits"], compiled(image)["logits"])


def test_int8_is_close_to_float(loaded, model_path, samples):
    session = onnxruntime.InferenceSession(model_path)
    signal = noise = 0.0
    for sample in samples:
        expected = session.run(None, {"image": sample[None]})[0]
        signal += float(np.square(expected).sum())
        noise += float(np.square(loaded(sample[None])["logits"] - expected).sum())
    assert 10 * np.log10(signal / noise) > 25


def test_the_library_says_what_it_is(loaded):
    assert [str(spec) for spec in loaded.inputs] == ["image: float32 1x1x8x8"]
    assert [str(spec) for spec in loaded.outputs] == ["logits: float32 1x10"]
    assert [layer.name for layer in loaded.layers] == ["stem", "conv", "fc"]
    assert loaded.layers[1].pattern == "1x4"
    assert loaded.manifest["source"]["file"] == "tiny.onnx"
    assert len(loaded.manifest["source"]["sha256"]) == 64
    assert "conv" in loaded.report()


def test_inputs_by_name_by_position_and_by_mapping(loaded, image):
    expected = loaded(image=image)["logits"]
    for outputs in (loaded(image), loaded({"image": image})):
        np.testing.assert_array_equal(outputs["logits"], expected)


def test_what_is_safely_cast_is_cast(loaded, image):
    expected = loaded(image)["logits"]
    np.testing.assert_array_equal(loaded(image.astype(np.float64))["logits"], expected)
    half = image.astype(np.float16)
    np.testing.assert_array_equal(loaded(half)["logits"], loaded(half.astype(np.float32))["logits"])
    np.testing.assert_array_equal(loaded(image.tolist())["logits"], expected)


def test_memory_order_does_not_matter(loaded, image):
    expected = loaded(image)["logits"]
    for same in (np.asfortranarray(image), np.ascontiguousarray(image[..., ::-1])[..., ::-1]):
        np.testing.assert_array_equal(loaded(same)["logits"], expected)


def test_outputs_belong_to_the_caller(loaded, image):
    first = loaded(image)["logits"]
    kept = first.copy()
    loaded(1 - image)
    np.testing.assert_array_equal(first, kept)
    first[:] = 0


def test_nan_passes_through_without_a_crash(loaded, image):
    assert loaded(np.full_like(image, np.nan))["logits"].shape == (1, 10)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"image": np.zeros(SHAPE, np.uint8)}, "is uint8 and the model takes float32"),
        ({"image": np.zeros(SHAPE, bool)}, "is bool"),
        ({"image": np.zeros(SHAPE, complex)}, "is complex128"),
        ({"image": np.array([["a"]])}, "is <U1"),
        ({"image": np.zeros((1, 8, 8, 1), np.float32)}, "has shape (1, 8, 8, 1) and the model takes (1, 1, 8, 8)"),
        ({"image": np.zeros((2, 1, 8, 8), np.float32)}, "has shape"),
        ({}, "'image' is missing; the model takes image: float32 1x1x8x8"),
        ({"picture": np.zeros(SHAPE, np.float32)}, "'image' is missing"),
        ({"image": np.zeros(SHAPE, np.float32), "x": 1}, "'x' is not known"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(loaded, arguments, says):
    with pytest.raises(UsageError) as caught:
        loaded(**arguments)
    assert says in str(caught.value)


def test_too_many_and_twice_given_inputs_are_refused(loaded, image):
    with pytest.raises(UsageError, match="takes 1 inputs"):
        loaded(image, image)
    with pytest.raises(UsageError, match="given twice"):
        loaded(image, image=image)


def test_a_cpu_without_the_instructions_is_refused_before_loading(altered, monkeypatch):
    path = altered('"popcnt"', '"flying"')
    monkeypatch.setattr("pumice.loader.ctypes.CDLL", None)
    with pytest.raises(UnsupportedError, match="this CPU lacks flying"):
        pumice.load(path)


def test_another_architecture_is_refused(altered):
    with pytest.raises(UnsupportedError, match="compiled for sparc9"):
        pumice.load(altered('"architecture":"x86_64"', '"architecture":"sparc9"'))


def test_running_needs_no_tvm(library):
    program = """
import sys
import numpy as np
import pumice

model = pumice.load(sys.argv[1])
model.verify()
model(np.zeros((1, 1, 8, 8), np.float32))
assert "pumice.loader" in sys.modules
print(sorted({"tvm", "tvm_ffi", "onnx"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program, library], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_code_that_does_not_load_is_refused(library, tmp_path):
    content = bytearray(library.read_bytes())
    content[16:18] = b"\x01\x00"  # a relocatable object, which no loader takes
    path = tmp_path / "object.so"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="cannot be loaded"):
        pumice.load(path)


def test_a_compiled_model_is_not_saved_into_nowhere(compiled, tmp_path):
    with pytest.raises(UsageError, match="cannot be written"):
        compiled.save(tmp_path / "none" / "model.so")


def test_threads_take_turns(loaded, samples):
    expected = [loaded(sample[None])["logits"] for sample in samples]
    wrong: list[int] = []

    def work(i):
        for _ in range(20):
            if not np.array_equal(loaded(samples[i][None])["logits"], expected[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_thread_counts_give_the_same_numbers(library, image):
    one = pumice.load(library, threads=1)
    two = pumice.load(library)
    for _ in range(3):
        np.testing.assert_array_equal(one(image)["logits"], two(image)["logits"])
