"""The file that is copied to a box, by itself: on a library written by hand in C, which can fail in every way."""

import ast
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from pumice import loader
from pumice.loader import (
    DifferenceError,
    Library,
    MissingDependencyError,
    Model,
    ModelError,
    PumiceError,
    UnsupportedError,
    UsageError,
    host_architecture,
    load,
    parse_cpuinfo,
)

SOURCE = r"""
#include "pumice.h"
#include <stdlib.h>
#include <string.h>

#ifndef ABI
#define ABI PUMICE_ABI
#endif
#ifndef OPEN
#define OPEN PUMICE_OK
#endif
#ifndef ROWS
#define ROWS 2
#endif

__asm__(".section .pumice.manifest,\"a\",%progbits\n.incbin \"manifest.json\"\n.text\n");

struct pumice_instance { char error[64]; };
static const uint64_t shape[] = {ROWS, 3};
static const pumice_tensor tensor = {"x", "float32", ROWS * 12, 2, shape};

uint32_t pumice_abi(void) { return ABI; }
uint32_t pumice_input_count(void) { return 1; }
uint32_t pumice_output_count(void) { return 1; }
const pumice_tensor *pumice_input(uint32_t index) { return index ? NULL : &tensor; }
const pumice_tensor *pumice_output(uint32_t index) { return index ? NULL : &tensor; }
uint32_t pumice_step_count(void) { return 2; }
pumice_status pumice_open(uint32_t threads, pumice_instance **instance, char *message, uint64_t size) {
    *instance = OPEN ? NULL : calloc(1, sizeof **instance);
    strncpy(message, "no such luck", size);
    return OPEN;
}
pumice_status pumice_run_steps(pumice_instance *instance, const void *const *inputs, void *const *outputs,
                               uint32_t first, uint32_t last) {
    if (last > 2)
        return strcpy(instance->error, "there is no such step"), PUMICE_BAD_ARGUMENT;
    const float *x = inputs[0];
    for (int i = 0; i < ROWS * 3; i++)
        ((float *)outputs[0])[i] = x[i] * (last - first);
    return PUMICE_OK;
}
pumice_status pumice_verify(pumice_instance *instance, uint32_t *step) {
    *step = 1;
    return strcpy(instance->error, "layer 'conv' differs"), PUMICE_DIFFERS;
}
const char *pumice_error(const pumice_instance *instance) { return instance->error; }
void pumice_close(pumice_instance *instance) { free(instance); }
"""

TENSOR = {"name": "x", "shape": [2, 3], "dtype": "float32"}
MANIFEST = {
    "format": loader.FORMAT,
    "target": {"name": "any", "architecture": host_architecture(), "features": []},
    "inputs": [TENSOR],
    "outputs": [{**TENSOR, "name": "y\x1b[31m", "scale": 0.5, "zero_point": 3}],
    "layers": [],
    "steps": [],
    "workspace": 0,
    "weights": 0,
    "versions": {},
    "check": True,
}
ROOT = Path(loader.__file__).parents[1]
X = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture(scope="session")
def make(tmp_path_factory):
    """Compile the library with a changed manifest or with macros."""
    compiler = shutil.which("cc") or shutil.which("gcc") or pytest.skip("needs a C compiler: apt-get install gcc")

    def make(*macros, **manifest):
        folder = tmp_path_factory.mktemp("library")
        (folder / "manifest.json").write_text(json.dumps({**MANIFEST, **manifest}))
        (folder / "stub.c").write_text(SOURCE)
        shutil.copy(ROOT / "targets/runtime/pumice.h", folder)
        command = [compiler, "-shared", "-fPIC", *macros, "-o", "stub.so", "stub.c"]
        subprocess.run(command, cwd=folder, check=True)
        return folder / "stub.so"

    return make


@pytest.fixture(scope="session")
def stub(make):
    return make()


@pytest.fixture
def model(stub):
    with load(stub) as model:
        yield model


def test_it_runs_and_says_what_it_is(model):
    np.testing.assert_array_equal(model(x=X)["y\x1b[31m"], 2 * X)
    assert str(model.inputs[0]) == "x: float32 2x3"
    assert model.outputs[0].scale == 0.5
    assert model.threads == 1


def test_arrays_that_fit_are_neither_copied_nor_moved(model):
    out = np.zeros((2, 3), np.float32)
    model.run([X], [out])
    np.testing.assert_array_equal(out, 2 * X)
    model.run([X], [out], 0, 1)
    np.testing.assert_array_equal(out, X)
    assert model.bind([X], {})[0] is X


def test_arrays_that_lie_otherwise_are_copied(model):
    for same in (np.asfortranarray(X), X[::-1][::-1], X.astype(">f4"), X.astype(np.float64), X.astype(np.float16)):
        np.testing.assert_array_equal(model(same)["y\x1b[31m"], 2 * X)


def test_an_array_that_is_not_aligned_is_copied(model):
    odd = np.zeros(25, np.uint8)[1:].view(np.float32).reshape(2, 3)
    odd[...] = X
    assert not odd.flags.aligned
    np.testing.assert_array_equal(model(odd)["y\x1b[31m"], 2 * X)
    assert model.bind([odd], {})[0].flags.aligned


@pytest.mark.parametrize(
    "out",
    [
        np.zeros((3, 2), np.float32),
        np.zeros((2, 3), np.float64),
        np.zeros((2, 6), np.float32)[:, ::2],
        np.broadcast_to(np.float32(0), (2, 3)),
        np.zeros(25, np.uint8)[1:].view(np.float32).reshape(2, 3),
    ],
    ids=["shape", "type", "strided", "read-only", "unaligned"],
)
def test_results_are_written_only_where_they_fit(model, out):
    with pytest.raises(UsageError, match="output"):
        model.run([X], [out])
    with pytest.raises(UsageError, match="gives 1 outputs, not 0"):
        model.run([X], [])


def test_failures_carry_the_librarys_sentence(model, stub):
    with pytest.raises(UsageError, match=f"{stub}: there is no such step"):
        model.run([X], [np.zeros_like(X)], 0, 3)
    with pytest.raises(DifferenceError, match="layer 'conv' differs"):
        model.verify()


@pytest.mark.parametrize(
    ("status", "error"),
    [(2, PumiceError), (3, PumiceError), (4, UnsupportedError), (5, MissingDependencyError), (99, PumiceError)],
)
def test_opening_fails_with_the_librarys_sentence(make, status, error):
    with pytest.raises(PumiceError, match="no such luck") as caught:
        load(make(f"-DOPEN={status}"))
    assert type(caught.value) is error


def test_a_closed_model_is_refused(stub):
    model = load(stub)
    model.close()
    model.close()
    with pytest.raises(UsageError, match="closed"):
        model(X)


def test_a_library_without_a_check_says_so(make):
    with pytest.raises(UsageError, match="--no-check"):
        load(make(check=None)).verify()


def test_instances_run_side_by_side(stub):
    library = Library(stub)
    right = []

    def work(scale):
        with Model(library) as model:
            right.append(all(np.array_equal(model(scale * X)["y\x1b[31m"], 2 * scale * X) for _ in range(50)))

    workers = [threading.Thread(target=work, args=(np.float32(i),)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert right == [True] * 4


@pytest.mark.parametrize(
    ("manifest", "error", "says"),
    [
        ({"format": loader.FORMAT + 1}, ModelError, "install the version that wrote it"),
        ({"inputs": [{"name": "x"}]}, ModelError, "damaged"),
        ({"inputs": [{**TENSOR, "dtype": "pickle"}]}, ModelError, "damaged"),
        ({"inputs": [{**TENSOR, "shape": [2, 4]}]}, ModelError, "not that of its code"),
        ({"inputs": [{**TENSOR, "shape": [2**40, 2**40]}]}, ModelError, "not that of its code"),
        ({"outputs": []}, ModelError, "not that of its code"),
        ({"target": {**MANIFEST["target"], "features": ["flying"]}}, UnsupportedError, "this CPU lacks flying"),
        ({"target": {**MANIFEST["target"], "architecture": "sparc9"}}, UnsupportedError, "compiled for sparc9"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(make, manifest, error, says):
    with pytest.raises(error, match=says):
        load(make(**manifest))


def test_another_interface_is_refused(make):
    with pytest.raises(ModelError, match="version 2 of the C interface"):
        load(make("-DABI=2"))


@pytest.mark.parametrize("threads", [0, -1, 1025, 2**32 + 1, 1.5, True, "two"])
def test_thread_counts_that_are_none(stub, threads):
    with pytest.raises(UsageError, match="thread count"):
        load(stub, threads)


def test_features_are_those_of_all_cores():
    assert parse_cpuinfo("flags : avx avx2\nbogus\nflags : avx\n") == {"avx"}
    assert parse_cpuinfo("Features : asimd\n") == {"asimd"}
    assert parse_cpuinfo("") == frozenset()


def test_the_file_stands_alone_on_an_old_python():
    tree = ast.parse(Path(loader.__file__).read_text(), feature_version=(3, 8))
    names = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "")])
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert "numpy" in names
    assert names - {"numpy"} <= set(sys.stdlib_module_names)


@pytest.fixture
def command(tmp_path):
    """The file copied elsewhere, run by a Python that finds no package of ours."""
    script = shutil.copy(loader.__file__, tmp_path / "loader.py")

    def command(*arguments):
        done = subprocess.run(
            [sys.executable, "-I", script, *map(str, arguments)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout, done.stderr

    return command


def test_the_command(command, stub, tmp_path):
    code, out, _ = command(stub, "describe")
    assert code == 0
    assert "output y\\x1b[31m: float32 2x3 (in int8: scale 0.5, zero point 3)" in out
    np.savez(tmp_path / "in.npz", x=X)
    code, _, err = command(stub, "run", "in.npz", "out.npz")
    assert (code, err) == (0, "")
    with np.load(tmp_path / "out.npz") as written:
        np.testing.assert_array_equal(written["y\x1b[31m"], 2 * X)
    code, _, err = command(stub, "verify")
    assert code == 6
    assert err == f"loader.py: {stub}: layer 'conv' differs\n"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["none.so", "describe"], 3),
        (["STUB", "run", "none.npz", "out.npz"], 2),
        (["STUB", "run", "STUB", "out.npz"], 2),
        (["STUB", "run", "pickle.npy", "out.npz"], 2),
        (["STUB", "run", "wrong.npz", "out.npz"], 2),
        (["STUB", "run", "in.npz", "none/out.npz"], 2),
        (["STUB", "--threads", "0", "run", "in.npz", "out.npz"], 2),
        (["STUB", "fly"], 2),
        (["none.pum", "describe"], 3),
    ],
    ids=str,
)
def test_the_command_refuses(command, stub, tmp_path, arguments, code):
    np.savez(tmp_path / "in.npz", x=X)
    np.savez(tmp_path / "wrong.npz", y=X)
    np.save(tmp_path / "pickle.npy", np.array([{}]), allow_pickle=True)
    before = sorted(tmp_path.iterdir())
    ended, out, err = command(*[str(stub) if a == "STUB" else a for a in arguments])
    assert ended == code
    assert not out
    assert err
    assert sorted(tmp_path.iterdir()) == before
