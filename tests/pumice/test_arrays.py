import zipfile

import numpy as np
import pytest

from pumice.arrays import read_arrays, write_arrays
from pumice.errors import UsageError


def test_arrays_come_back_under_any_name(tmp_path):
    arrays = {
        "image": np.arange(6, dtype=np.float32).reshape(2, 3),
        "file": np.array(3),
        "a/b:0": np.zeros((0, 2), np.int8),
        "été \x1b[31m": np.asfortranarray(np.eye(3)),
    }
    write_arrays(tmp_path / "arrays.npz", arrays)
    again = read_arrays(tmp_path / "arrays.npz")
    assert list(again) == list(arrays)
    for name, array in arrays.items():
        assert again[name].dtype == array.dtype
        np.testing.assert_array_equal(again[name], array)


def test_python_objects_are_never_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    path = tmp_path / "trap.npz"
    np.savez(path, image=np.array([Trap()], dtype=object))
    with pytest.raises(UsageError, match="Python objects"):
        read_arrays(path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a zip", bytes(1000)])
def test_what_is_no_archive_is_refused(tmp_path, content):
    path = tmp_path / "bad.npz"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"bad\.npz"):
        read_arrays(path)


def test_folders_missing_files_and_other_entries_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none.npz"):
        with pytest.raises(UsageError, match="cannot be read"):
            read_arrays(path)
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(UsageError, match=r"readme\.txt"):
        read_arrays(tmp_path / "text.npz")


def test_a_small_file_does_not_unpack_to_gigabytes(tmp_path):
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("image.npy", "w") as entry:
        piece = bytes(1 << 20)
        for _ in range(1100):
            entry.write(piece)
    with pytest.raises(UsageError, match="unpack"):
        read_arrays(path)


def test_an_array_cut_off_is_refused(tmp_path):
    path = tmp_path / "cut.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("image.npy", b"\x93NUMPY\x01\x00\x76\x00{'descr': '<f4', 'fortran_order': False, ")
    with pytest.raises(UsageError, match=r"cut\.npz"):
        read_arrays(path)
