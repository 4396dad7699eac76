"""Masks beside a model: side files, state dicts, and what they do to the module form."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save_file
from tvm import relax
from tvm.ir import IRModule

from pumice.errors import ModelError
from pumice.frontend.masks import apply_masks, fold_masks_in_state_dict, read_masks, read_state_dict
from pumice.module import mask_sources_of, weights_of, with_source, with_weights


def linear(weight: np.ndarray) -> IRModule:
    """``x @ fc.weight.T`` as the frontends leave it: the weight [N, K] behind a permutation."""
    outputs, inputs = weight.shape
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, inputs), "float32"))
    w = relax.Var("fc.weight", relax.TensorType((outputs, inputs), "float32"))
    with builder.function("main", [x, w], attrs={"num_input": 1}):
        with builder.dataflow():
            y = builder.emit_output(relax.op.matmul(x, relax.op.permute_dims(w)))
        builder.emit_func_output(y)
    return with_source(with_weights(builder.get(), {"fc.weight": weight}), "model")


weights = hnp.arrays(np.float32, (3, 5), elements=st.floats(width=32))
kept = hnp.arrays(np.bool_, (3, 5))


@given(weights, kept)
def test_pruned_positions_are_zero_and_the_others_keep_their_bits(weight: np.ndarray, mask: np.ndarray) -> None:
    masked = weights_of(apply_masks(linear(weight), {"fc.weight": mask}, "side file m.npz"))["fc.weight"]
    assert np.array_equal(masked[mask].view("u4"), weight[mask].view("u4"))
    assert not masked[~mask].view("u4").any()  # not even -0.0


@given(weights, kept)
def test_a_mask_applied_twice_changes_nothing(weight: np.ndarray, mask: np.ndarray) -> None:
    once = apply_masks(linear(weight), {"fc.weight": mask})
    twice = apply_masks(once, {"fc.weight": mask})
    assert weights_of(once)["fc.weight"].tobytes() == weights_of(twice)["fc.weight"].tobytes()


def test_the_origin_of_a_mask_is_recorded() -> None:
    mod = apply_masks(linear(np.ones((2, 4), "f4")), {"fc.weight": np.eye(2, 4)}, "side file masks.npz")
    assert mask_sources_of(mod) == {"fc.weight": "side file masks.npz"}
    assert mask_sources_of(linear(np.ones((2, 4), "f4"))) == {}


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"fc.weights": np.ones((2, 4))}, r"has no weight 'fc.weights'; did you mean 'fc.weight'"),
        ({"other": np.ones((2, 4))}, r"has no weight 'other'; its weights are 'fc.weight'$"),
        ({"fc.weight": np.ones((4, 2))}, r"'fc.weight' has the shape 4x2, the weight 2x4"),
        ({"fc.weight": np.full((2, 4), 0.5)}, r"'fc.weight' holds 0.5"),
        ({"fc.weight": np.full((2, 4), np.nan)}, r"'fc.weight' holds nan"),
        ({"fc.weight": np.full((2, 4), -1)}, r"'fc.weight' holds -1"),
        ({"fc.weight": np.full((2, 4), "1")}, r"'fc.weight' is of type"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(masks: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        apply_masks(linear(np.ones((2, 4), "f4")), masks)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "float32", "float16"])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_masks_are_read_from_both_kinds_of_file(tmp_path: Path, suffix: str, dtype: str) -> None:
    mask = np.eye(3, 4).astype(dtype)
    path = tmp_path / f"masks{suffix}"
    if suffix == ".npz":
        np.savez_compressed(path, **{"block.0/fc.weight": mask, "f": np.asfortranarray(mask)})
    else:
        save_file({"block.0/fc.weight": mask, "f": mask}, path)
    read = read_masks(path)
    assert list(read) == ["block.0/fc.weight", "f"]
    for array in read.values():
        assert array.dtype == np.bool_
        np.testing.assert_array_equal(array, mask.astype(bool))


def safetensors(header: dict[str, object] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(start: int, end: int, shape: list[int]) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


BAD_SAFETENSORS = {
    "empty": b"",
    "header of 100 MB": safetensors(b"{}", length=100 << 20),
    "header past the end": safetensors(b"{}", length=50),
    "not json": safetensors(b"{oops}"),
    "overlapping": safetensors({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, bytes(12)),
    "negative": safetensors({"a": tensor(-8, 0, [2])}, bytes(8)),
    "too short": safetensors({"a": tensor(0, 8, [2])}, bytes(4)),
    "shape against bytes": safetensors({"a": tensor(0, 8, [3])}, bytes(8)),
    "overflow": safetensors({"a": tensor(0, 8, [2**32, 2**32])}, bytes(8)),
    "a torch pickle": b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.",
    "a zip": b"PK\x03\x04" + bytes(40),
    "html": b"<!DOCTYPE html><html>404</html>",
}


@pytest.mark.parametrize("kind", BAD_SAFETENSORS)
def test_a_bad_safetensors_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "masks.safetensors"
    path.write_bytes(BAD_SAFETENSORS[kind])
    with pytest.raises(ModelError, match=r"^masks\.safetensors: ") as caught:
        read_masks(path)
    assert "\n" not in str(caught.value)


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


BAD_MEMBERS = {
    "objects": npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", b"\x80\x04N."),
    "huge shape": npy("{'descr': '|b1', 'fortran_order': False, 'shape': (1099511627776,), }", b"\1"),
    "overflowing shape": npy("{'descr': '|b1', 'fortran_order': False, 'shape': (4294967296, 4294967296), }", b"\1"),
    "negative shape": npy("{'descr': '|b1', 'fortran_order': False, 'shape': (-1, -1), }", b"\1"),
    "short": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4,), }", bytes(8)),
    "no array": b"hello",
    "code in the header": npy("{'descr': __import__('os').system('true'), 'fortran_order': False, 'shape': (1,)}"),
    "half": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }", struct.pack("<f", 0.5)),
}


@pytest.mark.parametrize("kind", BAD_MEMBERS)
def test_a_bad_array_in_a_npz_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "masks.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("fc.weight.npy", BAD_MEMBERS[kind])
    with pytest.raises(ModelError, match=r"^masks\.npz: ") as caught:
        read_masks(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"garbage" * 9, b"PK\x03\x04" + bytes(30)])
def test_a_file_that_is_no_npz_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "masks.npz"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"^masks\.npz: "):
        read_masks(path)


def test_a_npz_file_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "masks.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("w.npy", "w") as stream:
        for _ in range(513):
            stream.write(bytes(1 << 20))
    with pytest.raises(ModelError, match="512 MB"):
        read_masks(path)


@pytest.mark.parametrize("name", ["absent.npz", "absent.safetensors", "folder.npz", "masks.pt", "masks.npy"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.npz").mkdir()
    if name.startswith("masks"):
        (tmp_path / name).write_bytes(b"\x80\x04N.")
    with pytest.raises(ModelError, match=rf"^{name}: "):
        read_masks(tmp_path / name)


@given(weights, kept)
def test_a_state_dict_is_folded(weight: np.ndarray, mask: np.ndarray) -> None:
    state = {"a.bias": weight[0], "a.weight_orig": weight, "a.weight_mask": mask.astype("f4"), "b.alone_orig": weight}
    plain, masks = fold_masks_in_state_dict(state)
    assert list(plain) == ["a.bias", "a.weight", "b.alone_orig"]
    assert list(masks) == ["a.weight"]
    np.testing.assert_array_equal(masks["a.weight"], mask)
    assert np.array_equal(plain["a.weight"][mask].view("u4"), weight[mask].view("u4"))
    assert not plain["a.weight"][~mask].view("u4").any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w_mask": np.ones(3)}, "shape 3, the weight 4"),
        ({"w_mask": np.full(4, 2.0)}, "holds 2.0"),
        ({"w": np.ones(4)}, "both 'w' and 'w_orig'"),
    ],
)
def test_a_state_dict_with_a_bad_mask_is_refused(change: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        fold_masks_in_state_dict({"w_orig": np.ones(4, "f4"), "w_mask": np.ones(4, "f4"), **change})


def test_a_state_dict_is_read_from_safetensors_only(tmp_path: Path) -> None:
    save_file({"w_orig": np.ones(4, "f4"), "w_mask": np.eye(1, 4, dtype="f4")[0]}, tmp_path / "s.safetensors")
    plain, _ = fold_masks_in_state_dict(read_state_dict(tmp_path / "s.safetensors"))
    np.testing.assert_array_equal(plain["w"], [1, 0, 0, 0])
    (tmp_path / "s.pt").write_bytes(b"\x80\x04N.")
    with pytest.raises(ModelError, match=r"s\.pt: a state dict is read from a \.safetensors file only"):
        read_state_dict(tmp_path / "s.pt")
