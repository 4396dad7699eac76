"""The demo network shipped to this machine, and what the table makes of such results."""

import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the other networks are made by PyTorch: pip install torch")

from bench.boxes import empty_root
from bench.shipping import ALLOWED, Shipped, Start, foreign_symbols, ship, table, verdict
from pumice.errors import MissingDependencyError

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="needs a C compiler: apt-get install gcc")

START = Start(milliseconds=1.25, resident=3_000_000, own=900_000, is_in_empty_root=True)


def shipped(**facts):
    usual = {
        "network": "net", "target": "native", "isa": "avx2", "gpus": [], "file": 2_000_000, "weights": 1_000_000,
        "plan": 500_000, "steps": 12, "exact": 12, "how": "C, empty root", "is_same": True, "foreign": [],
        "start": START,
    }  # fmt: skip
    return Shipped(**usual | facts)


def test_the_demo_network_ships_to_this_machine():
    (entry,) = ship("demo", ["native"])
    assert entry.is_same and entry.exact == entry.steps > 10
    assert entry.foreign == [] and entry.start.milliseconds > 0
    assert entry.weights < entry.file and 0 < entry.start.own < entry.start.resident <= entry.bound


def test_a_symbol_of_neither_libc_nor_libm_is_named(tmp_path):
    (tmp_path / "lib.c").write_text(
        "double sin(double), other(double);\ndouble f(double x) { return sin(other(x)); }\n"
    )
    subprocess.run(["gcc", "-shared", "-fPIC", "-fno-builtin", "-nostartfiles", "lib.c", "-o", "lib.so", "-lm"],
                   cwd=tmp_path, check=True)  # fmt: skip
    assert foreign_symbols(tmp_path / "lib.so") == ["other"]


def test_an_empty_root_takes_no_library_but_libc(tmp_path):
    if not (program := shutil.which("nm")):
        pytest.skip("needs a program with a library of its own: apt-get install binutils")
    with pytest.raises(MissingDependencyError, match=r"nm.*needs.*libbfd"):
        empty_root(tmp_path, Path(program))


def test_table():
    entries = [
        shipped(),
        shipped(target="cuda", start=None, how="code for 7 GPUs, emulated", exact=8),
        shipped(target="armv8-a", start=None, how="C, qemu cortex-a53", is_same=False),
    ]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(entries).splitlines()[2:]]
    assert cells[0] == ["net", "native", "2.00", "1.00", "0.50", "3.00", f"{(1_500_000 + ALLOWED) / 1e6:.2f}", "0.90",
                        "1.2", "12 of 12 steps", "C, empty root"]  # fmt: skip
    assert cells[1][5:] == ["", "", "", "", "8 of 12 steps, outputs", "code for 7 GPUs, emulated"]
    assert cells[2][9] == verdict(entries[2]) == "no"
    assert verdict(shipped(is_same=None)) == ""
