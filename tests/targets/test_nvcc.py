"""How nvcc is found and called; a script stands for it."""

import pytest

from pumice.errors import MissingDependencyError, UnsupportedError
from pumice.targets import nvcc
from pumice.targets.nvcc import OPTIONS, find_nvcc

# Writes its arguments, then the source, where the cubin should be.
WORKS = """#!/bin/sh
if [ "$1" = --list-gpu-code ]; then echo sm_75; echo sm_87; exit 0; fi
for last; do :; done
echo "$@" > "$last"; cat kernels.cu >> "$last"
"""
FAILS = """#!/bin/sh
if [ "$1" = --list-gpu-code ]; then echo sm_75; exit 0; fi
echo "kernels.cu(3): warning: something" >&2
echo "kernels.cu(4): error: no such thing" >&2
exit 2
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    def install(script: str) -> None:
        program = tmp_path / "bin" / "nvcc"
        program.parent.mkdir(exist_ok=True)
        program.write_text(script)
        program.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))

    return install


def test_every_architecture_gets_an_image_of_the_source(install):
    install(WORKS)
    images = find_nvcc().cubins("source\n", ["sm_87", "sm_75"])
    assert list(images) == ["sm_87", "sm_75"]
    command, source = images["sm_87"].decode().splitlines()
    assert source == "source" and "-arch=sm_87" in command and "-fmad=false" in OPTIONS
    assert all(option in command.split() for option in OPTIONS)


def test_an_architecture_that_it_does_not_know_is_named(install):
    install(WORKS)
    with pytest.raises(UnsupportedError, match=r"does not compile for sm_80, sm_90.*another version"):
        find_nvcc().cubins("", ["sm_75", "sm_90", "sm_80"])


def test_what_it_says_is_passed_on(install):
    install(FAILS)
    with pytest.raises(MissingDependencyError, match=r"sm_75: kernels.cu\(4\): error: no such thing"):
        find_nvcc().cubins("", ["sm_75"])


def test_without_it_the_message_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(nvcc, "USUAL", str(tmp_path / "nvcc"))
    monkeypatch.setattr(nvcc, "_in_wheels", list)
    with pytest.raises(MissingDependencyError, match=r"apt-get install nvidia-cuda-toolkit.*no GPU"):
        find_nvcc()
