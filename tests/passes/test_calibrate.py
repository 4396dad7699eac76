import numpy as np
import pytest
from network import Network, residual_network
from tvm.relax import op as R

from pumice.errors import ModelError, UsageError
from pumice.passes.calibrate import Affine, Calibrate, Samples, ranges_of, read_calibration, with_ranges, without_ranges
from pumice.passes.quantize import Quantize


def identity_then_linear(shape=(2, 4), dtype="float32"):
    net = Network()
    x = net.input("x", shape, dtype)
    data = x if dtype == "float32" else net.call("as_float", R.astype(x, "float32"))
    return net.finish(y=net.linear("fc", data, 3))


def test_ranges_are_the_tensors_own():
    net = Network()
    w = net.weight("double.weight", 2 * np.eye(4, dtype=np.float32))
    y = net.relu("r", net.linear("double", net.input("x", (1, 4)), 4, bias=False, weight=w))
    mod = net.finish(y=net.linear("fc", y, 3))
    samples = np.array([[-1, 0, 1, 1], [0, 0, 0, 4]], np.float32)
    ranges = ranges_of(Calibrate({"x": samples}, "minmax")(mod))
    assert ranges == {"x": Affine(float(np.float32(5 / 255)), 51), "r": Affine(float(np.float32(8 / 255)), 0)}


def test_samples_are_pieces_of_the_first_dimension():
    mod = identity_then_linear((2, 4))
    array = np.arange(24, dtype=np.float32).reshape(6, 4)
    pieces = list(Samples(mod, {"x": array}))
    assert len(pieces) == 3
    np.testing.assert_array_equal(np.concatenate([piece["x"] for piece in pieces]), array)


def test_progress_and_memory_are_a_sample_at_a_time():
    calls = []
    mod = identity_then_linear((2, 4))
    Calibrate({"x": np.ones((6, 4), np.float32)}, progress=lambda *call: calls.append(call))(mod)
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_one_sample_and_only_zeros():
    mod = identity_then_linear((2, 4))
    assert ranges_of(Calibrate({"x": np.zeros((2, 4), np.float32)})(mod)) == {"x": Affine(1.0, 0)}


def test_nothing_to_quantize_runs_nothing():
    net = Network()
    mod = net.finish(y=net.relu("r", net.input("x", (2, 4))))
    assert ranges_of(Calibrate({"x": np.zeros((2, 4), np.float32)})(mod)) == {}


def test_a_scalar_input_takes_one_number_a_sample():
    net = Network()
    x, factor = net.input("x", (1, 4)), net.input("factor", ())
    mod = net.finish(y=net.linear("fc", net.call("scaled", R.multiply(x, factor)), 3))
    samples = {"x": np.ones((3, 4), np.float32), "factor": np.array([1, 2, 3], np.float32)}
    assert ranges_of(Calibrate(samples, "minmax")(mod))["scaled"].scale == float(np.float32(3 / 255))


@pytest.mark.parametrize("given", [np.int32, np.int8, np.uint16])
def test_integers_of_another_width_are_taken(given):
    samples = {"x": np.arange(8).reshape(2, 4).astype(given)}
    kind = "uint64" if given == np.uint16 else "int64"
    assert "as_float" in ranges_of(Calibrate(samples)(identity_then_linear((1, 4), kind)))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, r"no array for input 'x' of network\.onnx; there is no array at all"),
        ({"y": np.zeros((2, 4), "f")}, "no array for input 'x' .* there is 'y'"),
        ({"x": np.zeros((2, 4), "f"), "z": np.zeros(3)}, "'z' is no input .* inputs are 'x'"),
        ({"x": np.zeros((2, 4), np.uint8)}, "'x' is uint8, and the input is float32; convert it"),
        ({"x": np.zeros((2, 4), object)}, "'x' is object"),
        ({"x": np.zeros((4, 2), "f")}, "has shape 4x2, and samples of the input stack to Nx4"),
        ({"x": np.zeros((4,), "f")}, "has shape 4, and samples"),
        ({"x": np.zeros((0, 4), "f")}, "holds no sample"),
        ({"x": np.zeros((5, 4), "f")}, "5 rows, not a multiple of the input's first dimension 2; cut it to 4"),
        ({"x": np.array([[0, 0, 0, 0], [0, np.nan, 0, 0]], "f")}, "NaN or infinity in float32, first at index 1, 1"),
        ({"x": np.full((2, 4), 1e300)}, "NaN or infinity"),
    ],
)
def test_samples_that_do_not_fit(arrays, message):
    with pytest.raises(ModelError, match=message):
        Calibrate(arrays)(identity_then_linear((2, 4)))


def test_integers_that_do_not_fit():
    with pytest.raises(ModelError, match="values that do not fit the input's int32"):
        Samples(identity_then_linear((1, 4), "int32"), {"x": np.full((1, 4), 2**40)})


def test_inputs_with_different_numbers_of_samples():
    net = Network()
    mod = net.finish(y=net.add("sum", net.input("a", (1, 4)), net.input("b", (1, 4))))
    with pytest.raises(ModelError, match="different numbers of samples: 2 for 'a', 3 for 'b'"):
        Samples(mod, {"a": np.zeros((2, 4), "f"), "b": np.zeros((3, 4), "f")})


def test_a_model_that_overflows_is_named_with_the_tensor_and_sample():
    net = Network()
    x = net.input("x", (1, 4))
    mod = net.finish(y=net.linear("fc", net.call("square", R.multiply(x, x)), 3))
    samples = np.ones((3, 4), np.float32)
    samples[1] = 1e30
    with pytest.raises(ModelError, match=r"network\.onnx: calibration sample 2: tensor 'square' is not finite"):
        Calibrate({"x": samples})(mod)


def test_an_unknown_method():
    with pytest.raises(UsageError, match="no calibration method 'magic'; there are minmax, percentile, entropy, mse"):
        Calibrate({}, "magic")


def test_ranges_are_kept_with_the_module_and_forgotten_once_used():
    mod = residual_network()
    assert ranges_of(mod) == {}
    mod = with_ranges(mod, {"x": Affine(0.5, 3)})
    assert ranges_of(mod) == {"x": Affine(0.5, 3)}
    assert ranges_of(without_ranges(mod)) == {}
    calibrated = Calibrate({"image": np.ones((2, 4, 12, 12), np.float32)})(residual_network())
    assert ranges_of(calibrated) and ranges_of(Quantize()(calibrated)) == {}


class TestReadCalibration:
    def test_reads_what_savez_wrote(self, tmp_path):
        array = np.ones((4, 4), np.float32)
        np.savez_compressed(tmp_path / "data.npz", x=array)
        read = read_calibration(tmp_path / "data.npz", identity_then_linear((2, 4)))
        np.testing.assert_array_equal(read["x"], array)

    @pytest.mark.parametrize(
        ("content", "message"),
        [(b"", "not an .npz"), (b"<html>404</html>", "not an .npz"), (b"PK\x03\x04 truncated", "not an .npz")],
    )
    def test_not_an_archive(self, tmp_path, content, message):
        (tmp_path / "data.npz").write_bytes(content)
        with pytest.raises(ModelError, match=rf"data\.npz: {message}"):
            read_calibration(tmp_path / "data.npz", identity_then_linear())

    def test_missing_and_a_folder(self, tmp_path):
        for path in (tmp_path / "none.npz", tmp_path):
            with pytest.raises(ModelError, match="cannot be read"):
                read_calibration(path, identity_then_linear())

    def test_a_single_array_file(self, tmp_path):
        np.save(tmp_path / "data.npy", np.zeros((2, 4), "f"))
        with pytest.raises(ModelError, match=r"data\.npy: not an \.npz file"):
            read_calibration(tmp_path / "data.npy", identity_then_linear())

    def test_pickles_stay_shut(self, tmp_path):
        class Bomb:
            def __reduce__(self):
                return (pytest.fail, ("a pickle was opened",))

        np.savez(tmp_path / "data.npz", x=np.array([Bomb()], dtype=object))
        with pytest.raises(ModelError, match=r"data\.npz: an array in it cannot be read: .*pickle"):
            read_calibration(tmp_path / "data.npz", identity_then_linear())

    def test_a_damaged_array(self, tmp_path):
        np.savez_compressed(tmp_path / "data.npz", x=np.random.default_rng(0).normal(0, 1, (400, 4)).astype("f"))
        content = bytearray((tmp_path / "data.npz").read_bytes())
        content[300:600] = bytes(300)
        (tmp_path / "data.npz").write_bytes(content)
        with pytest.raises(ModelError, match=r"data\.npz"):
            read_calibration(tmp_path / "data.npz", identity_then_linear())

    def test_an_archive_that_unpacks_to_far_more(self, tmp_path, monkeypatch):
        monkeypatch.setattr("pumice.passes.calibrate._LARGEST_UNPACKED", 10**6)
        np.savez_compressed(tmp_path / "data.npz", x=np.zeros((10**6, 4), "f"))
        with pytest.raises(ModelError, match="unpacks to 16,000,128 bytes, over 100 times its own size"):
            read_calibration(tmp_path / "data.npz", identity_then_linear())

    def test_what_does_not_fit_names_the_file(self, tmp_path):
        np.savez(tmp_path / "data.npz", x=np.zeros((2, 5), "f"))
        with pytest.raises(ModelError, match=r"data\.npz: array 'x' has shape 2x5"):
            read_calibration(tmp_path / "data.npz", identity_then_linear())


def test_padding_tokens_widen_no_range():
    net = Network()
    x = net.input("x", (1, 3, 4))
    net.input("attention_mask", (1, 3), "int64")
    mod = net.finish(y=net.linear("fc", x, 3))
    samples = {"x": np.ones((2, 3, 4), np.float32), "attention_mask": np.array([[1, 1, 0], [1, 0, 0]])}
    samples["x"][0, 2], samples["x"][1, 1:] = 100, -100
    assert ranges_of(Calibrate(samples, "minmax")(mod)) == {"x": Affine(float(np.float32(1 / 255)), 0)}
