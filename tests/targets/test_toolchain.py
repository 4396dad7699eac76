"""Which compiler links for what, and what comes out of each."""

import sys
from pathlib import Path

import pytest
from elf import Elf

from pumice.errors import MissingDependencyError, UsageError
from pumice.targets import toolchain
from pumice.targets.detect import host_architecture
from pumice.targets.target import Target
from pumice.targets.toolchain import Toolchain, check_libc, find_toolchain

SOURCE = """
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
static atomic_int calls;
static void *work(void *value) { return value; }
float logistic(float x) {
    pthread_t thread;
    if (pthread_create(&thread, 0, work, 0) == 0) pthread_join(thread, 0);
    atomic_fetch_add(&calls, 1);
    return 1 / (1 + expf(-x));
}
"""
DATA = '.section .data.rel.ro\n.globl stored\nstored: .incbin "stored.bin"\n.section .note.GNU-stack,"",%progbits\n'

NAMES = {"x86_64": "x86-64", "aarch64": "armv8-a"}
NATIVE = host_architecture()
FOREIGN = next(name for name in NAMES if name != NATIVE)


def target(architecture: str) -> Target:
    return Target.parse(NAMES[architecture])


def found(monkeypatch, programs=(), packages=()):
    """As if these were all that is installed."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: name if name in programs else None)
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: name if name in packages else None)


def test_native_takes_cc_of_the_environment_first(monkeypatch):
    found(monkeypatch, ["gcc", "ccache", "cc"])
    assert find_toolchain(target(NATIVE)).command[0] == "cc"
    monkeypatch.setenv("CC", "ccache gcc -m64")
    assert find_toolchain(target(NATIVE)).command[:3] == ("ccache", "gcc", "-m64")
    monkeypatch.setenv("CC", "not-there")
    assert find_toolchain(target(NATIVE)).command[0] == "cc"


def test_foreign_takes_the_cross_compiler_and_never_cc(monkeypatch):
    found(monkeypatch, ["cc", f"{FOREIGN}-linux-gnu-gcc"], ["ziglang"])
    monkeypatch.setenv("CC", "cc")
    assert find_toolchain(target(FOREIGN)).command[0] == f"{FOREIGN}-linux-gnu-gcc"


@pytest.mark.parametrize("architecture", NAMES)
@pytest.mark.parametrize(
    ("libc", "abi"), [(None, "gnu.2.28"), ("glibc-2.28", "gnu.2.28"), ("glibc-2.17", "gnu.2.17"), ("musl", "musl")]
)
def test_zig_links_where_there_is_nothing_else(monkeypatch, architecture, libc, abi):
    found(monkeypatch, [], ["ziglang"])
    command = find_toolchain(target(architecture), libc).command
    assert command[:6] == (sys.executable, "-m", "ziglang", "cc", "-target", f"{architecture}-linux-{abi}")


@pytest.mark.parametrize("architecture", NAMES)
def test_a_chosen_glibc_is_never_that_of_the_system(monkeypatch, architecture):
    found(monkeypatch, ["cc", "gcc", "aarch64-linux-gnu-gcc", "x86_64-linux-gnu-gcc"], ["ziglang"])
    monkeypatch.setenv("CC", "cc")
    assert "ziglang" in find_toolchain(target(architecture), "glibc-2.31").command


def test_musl_has_compilers_of_its_own(monkeypatch):
    found(monkeypatch, ["cc", "musl-gcc", f"{FOREIGN}-linux-gnu-gcc"], ["ziglang"])
    assert find_toolchain(target(NATIVE), "musl").command[0] == "musl-gcc"
    assert "ziglang" in find_toolchain(target(FOREIGN), "musl").command
    found(monkeypatch, [f"{FOREIGN}-linux-musl-gcc"], ["ziglang"])
    assert find_toolchain(target(FOREIGN), "musl").command[0] == f"{FOREIGN}-linux-musl-gcc"


@pytest.mark.parametrize(
    ("architecture", "libc", "says"),
    [
        (NATIVE, None, "`apt-get install gcc` or `pip install ziglang`"),
        (FOREIGN, None, f"`apt-get install gcc-{FOREIGN.replace('_', '-')}-linux-gnu` or `pip install ziglang`"),
        (NATIVE, "musl", "against musl is needed and none was found; install one: `apt-get install musl-tools` or"),
        (NATIVE, "glibc-2.28", "against glibc-2.28 is needed and none was found; install one: `pip install ziglang`"),
    ],
)
def test_without_a_compiler_the_message_says_how_to_install_one(monkeypatch, architecture, libc, says):
    found(monkeypatch)
    with pytest.raises(MissingDependencyError) as caught:
        find_toolchain(target(architecture), libc)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "libc", ["", "2.28", "glibc", "glibc-2", "glibc-2.28.1", "glibc-2.5", "glibc-3.1", "uclibc", "glibc-2.28\n"]
)
def test_other_libraries_are_refused(libc):
    with pytest.raises(UsageError, match=r"glibc-2\.28"):
        check_libc(libc)


def linked(compiler: Toolchain, folder: Path, stored: bytes = b"one") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("code.c", SOURCE.encode()), ("data.s", DATA.encode()), ("stored.bin", stored)):
        Path(folder, name).write_bytes(content)
    compiler.link("linked.so", ["code.c", "data.s"], folder)
    return Path(folder, "linked.so")


@pytest.fixture(params=[None, "glibc-2.17", "glibc-2.28", "musl"])
def libc(request) -> str | None:
    return request.param


@pytest.mark.parametrize("architecture", NAMES)
def test_libraries_need_no_more_than_was_asked_for(architecture, libc, tmp_path):
    compiler = available(architecture, libc)
    path = linked(compiler, tmp_path / "a")
    elf = Elf.read(path)
    assert elf.machine == architecture
    assert elf.undefined >= {"expf", "pthread_create"} and "logistic" in elf.exported
    if libc == "musl":
        assert elf.needed == ["libc.so"] and not elf.glibc
    else:
        assert elf.glibc >= (2, 2, 5)
        assert libc is None or elf.glibc <= tuple(map(int, libc.removeprefix("glibc-").split(".")))
    again = linked(compiler, tmp_path / "another" / "place")
    assert again.read_bytes() == path.read_bytes()
    assert b"another" not in linked(compiler, tmp_path / "a", b"two").read_bytes().replace(b"two", b"")


def test_what_the_assembler_includes_is_not_remembered(tmp_path):
    compiler = available(NATIVE, "glibc-2.28")
    assert b"first" in linked(compiler, tmp_path, b"first").read_bytes()
    assert b"second" in linked(compiler, tmp_path, b"second").read_bytes()


def test_an_error_is_the_compilers_first(tmp_path):
    tmp_path.joinpath("wrong.c").write_text("int f(void) { return unknown_name; }\n")
    with pytest.raises(MissingDependencyError, match="unknown_name"):
        available(NATIVE, None).link("linked.so", ["wrong.c"], tmp_path)


def available(architecture: str, libc: str | None) -> Toolchain:
    try:
        return find_toolchain(target(architecture), libc)
    except MissingDependencyError as error:
        pytest.skip(str(error))
