import zipfile

import pytest
from packages import ar_of, tar_of

from bench.data_packages import find_package, read_deb, read_tar, read_wheel
from pumice.errors import UsageError


def test_find_package_takes_the_newest(tmp_path):
    for name in ("a-1.whl", "a-2.whl", "b-9.whl"):
        (tmp_path / name).touch()
    assert find_package(tmp_path, "a-*.whl").name == "a-2.whl"


def test_find_package_says_what_is_missing(tmp_path):
    with pytest.raises(UsageError, match=r"a-\*\.whl.*README"):
        find_package(tmp_path, "a-*.whl")


def test_read_wheel(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("a/data.txt", "hello")
    assert read_wheel(tmp_path / "a.whl", "a/data.txt") == b"hello"


def test_read_tar():
    archive = tar_of({"x/a.txt": b"1", "x/b.txt": b"2"}, "w:gz")
    assert read_tar(archive, "/b.txt") == b"2"
    with pytest.raises(UsageError, match=r"c\.txt"):
        read_tar(archive, "/c.txt")


def test_read_deb_finds_files_behind_members_of_odd_length(tmp_path):
    data = tar_of({"./usr/a.png": b"1", "./usr/a.txt": b"2", "./usr/b.png": b"3"}, "w:xz")
    members = {"debian-binary": b"2.0", "control.tar.xz": b"x" * 7, "data.tar.xz": data}
    (tmp_path / "p.deb").write_bytes(ar_of(members))
    assert list(read_deb(tmp_path / "p.deb", ".png")) == [("./usr/a.png", b"1"), ("./usr/b.png", b"3")]


@pytest.mark.parametrize("contents", [b"", b"<html>", ar_of({"debian-binary": b"2.0"})])
def test_read_deb_refuses_what_is_no_package(tmp_path, contents):
    (tmp_path / "p.deb").write_bytes(contents)
    with pytest.raises(UsageError, match=r"p\.deb"):
        list(read_deb(tmp_path / "p.deb", ".png"))
