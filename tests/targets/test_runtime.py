"""The runtime of a library, around a pumice_steps that is written by hand: instances, threads, errors, verification."""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from elf import Elf

from pumice.errors import MissingDependencyError
from pumice.targets.check import Check, checksum
from pumice.targets.detect import LLVM_TO_CPUINFO, host_architecture, host_features
from pumice.targets.library import RUNTIME, link
from pumice.targets.model_source import ModelTables
from pumice.targets.plan import FIRST_INPUT, WORKSPACE, Plan, Step, View
from pumice.targets.target import Target
from pumice.targets.toolchain import find_toolchain

OK, BAD_ARGUMENT, NO_MEMORY, NO_THREADS, WRONG_CPU, NO_DEVICE, DEVICE_FAILED, DIFFERS = range(8)

SIZE = 1 << 12
PASSES = 20

# What the compiler generates, by hand. Step 0 copies the input to row 0 of the workspace, step k adds the weights to
# what row k - 1 holds, turned by one place, so that every task reads what another wrote, and the last step copies the
# last row out. Every task leaves its number in its scratch, and finds it there in the next step.
STEPS = """
#include <stdint.h>
enum { SIZE = 4096, PASSES = 20 };

static int failing(const int32_t *input) { return input[0] == -1; }

int32_t pumice_steps(void **buffers, int32_t first, int32_t last, int32_t task, int32_t tasks) {
    const int32_t *weights = buffers[0], *x = buffers[3];
    int32_t *workspace = buffers[1], *scratch = buffers[2], *y = buffers[4];
    for (int32_t step = first; step < last; step++) {
        if (step == 0) scratch[0] = task;
        if (scratch[0] != task || (step == 3 && failing(x))) return -1;
        const int32_t *from = step ? workspace + (step - 1) * SIZE : x;
        int32_t *to = step < PASSES ? workspace + step * SIZE : y;
        for (int32_t i = SIZE * (int64_t)task / tasks; i < SIZE * (int64_t)(task + 1) / tasks; i++)
            to[i] = step && step < PASSES ? from[(i + 1) % SIZE] + weights[i] : from[i];
    }
    return 0;
}
"""

SPEC = ((SIZE,), "int32")
WEIGHTS_ARRAY = np.arange(SIZE, dtype=np.int32)
ROW = 4 * SIZE


def plan() -> Plan:
    places = [View(FIRST_INPUT), *(View(WORKSPACE, k * ROW) for k in range(PASSES)), View(FIRST_INPUT + 1)]
    steps = [Step(f"pass_{k}", (places[k], places[k + 1]), "", (ROW,)) for k in range(PASSES + 1)]
    steps[2] = replace(steps[2], layer='a "layer"?? \\ é\n')
    return Plan({}, tuple(steps), WEIGHTS_ARRAY.view(np.uint8), PASSES * ROW, (SPEC,), (SPEC,))


def rows(x: np.ndarray) -> list[np.ndarray]:
    """What each step writes."""
    found = [x]
    for _ in range(PASSES - 1):
        found.append(np.roll(found[-1], -1) + WEIGHTS_ARRAY)
    return [*found, found[-1]]


X = np.random.default_rng(0).integers(0, 1000, SIZE, np.int32)
CHECK = Check((X,), tuple(checksum(row.tobytes()) for row in rows(X)), PASSES + 1, (rows(X)[-1],), 0.0)


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """A library around ``code``, as its path; ``changes`` are of the tables, ``flags`` of the compiler."""

    def make(code=STEPS, features=(), flags=(), libc=None, **changes) -> Path:
        folder = tmp_path_factory.mktemp("library")
        target = changes.get("target", replace(Target.parse("native"), features=frozenset(features)))
        tables = replace(ModelTables(plan(), target, ["x"], ["y"], 4, CHECK), **changes)
        Path(folder, "steps.c").write_text(code)
        Path(folder, "manifest.json").write_text('{"some": "thing"}')
        toolchain = find_toolchain(target, libc)
        strict = ("-Wall", "-Wextra", "-Werror", *flags)
        link(replace(toolchain, command=(*toolchain.command, *strict)), tables, ["steps.c"], folder)
        return folder / "linked.so"

    return make


class Tensor(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("dtype", ctypes.c_char_p),
        ("bytes", ctypes.c_uint64),
        ("rank", ctypes.c_uint32),
        ("shape", ctypes.POINTER(ctypes.c_uint64)),
    ]


def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name in ("manifest", "step_layer", "error"):
        getattr(library, f"pumice_{name}").restype = ctypes.c_char_p
    for name in ("input", "output"):
        getattr(library, f"pumice_{name}").restype = ctypes.POINTER(Tensor)
    library.pumice_memory.restype = ctypes.c_uint64
    return library


@pytest.fixture(scope="module")
def library(make):
    return load(make())


class Instance:
    """An instance that closes itself; ``run`` gives the output."""

    def __init__(self, library: ctypes.CDLL, threads: int = 1) -> None:
        self.library, self.handle = library, ctypes.c_void_p()
        message = ctypes.create_string_buffer(512)
        self.status = library.pumice_open(threads, ctypes.byref(self.handle), message, ctypes.c_uint64(512))
        self.message = message.value.decode()

    def __enter__(self):
        assert self.status == OK, self.message
        return self

    def __exit__(self, *_):
        self.library.pumice_close(self.handle)

    def run(self, x: np.ndarray) -> np.ndarray:
        y = np.full(SIZE, -7, np.int32)
        assert self.call(x, y) == OK, self.error
        return y

    def call(self, x, y, first=0, last=PASSES + 1) -> int:
        pointers = [(ctypes.c_void_p * 1)(array.ctypes.data if array is not None else None) for array in (x, y)]
        return self.library.pumice_run_steps(self.handle, *pointers, first, last)

    @property
    def error(self) -> str:
        return self.library.pumice_error(self.handle).decode()


def test_a_library_describes_itself(library):
    assert library.pumice_abi() == 1
    assert library.pumice_manifest() == b'{"some": "thing"}'
    assert (library.pumice_input_count(), library.pumice_output_count()) == (1, 1)
    for tensor, name in ((library.pumice_input(0), b"x"), (library.pumice_output(0), b"y")):
        got = tensor.contents
        assert (got.name, got.dtype, got.bytes, got.rank, got.shape[0]) == (name, b"int32", ROW, 1, SIZE)
    assert not library.pumice_input(1) and not library.pumice_output(1)
    assert library.pumice_step_count() == PASSES + 1
    assert library.pumice_step_layer(0) == b"pass_0"
    assert library.pumice_step_layer(2).decode() == 'a "layer"?? \\ é\n'
    assert library.pumice_step_layer(PASSES + 1) is None


def test_memory_is_what_lives_and_a_little_for_each_thread(library):
    one, two, nine = (library.pumice_memory(threads) for threads in (1, 2, 9))
    assert PASSES * ROW < one < PASSES * ROW + 4096
    assert 0 < two - one < 1024 and abs(nine - one - 8 * (two - one)) <= 8 * 64
    assert library.pumice_memory(0) == library.pumice_memory(1025) == 0


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_go_through_the_steps_together(library, threads):
    with Instance(library, threads) as instance:
        for seed in range(30):
            x = np.random.default_rng(seed).integers(0, 1000, SIZE, np.int32)
            np.testing.assert_array_equal(instance.run(x), rows(x)[-1])


def test_steps_run_one_at_a_time(library):
    with Instance(library, 2) as instance:
        y = np.zeros(SIZE, np.int32)
        for step in range(PASSES):
            assert instance.call(X, y, step, step + 1) == OK
        assert instance.call(X, y, 3, 3) == OK
        assert not y.any()
        assert instance.call(X, y, PASSES, PASSES + 1) == OK
        np.testing.assert_array_equal(y, rows(X)[-1])


def test_instances_run_side_by_side(library):
    wrong: list[int] = []

    def work(seed: int) -> None:
        with Instance(library, 1 + seed % 2) as instance:
            x = np.random.default_rng(seed).integers(0, 1000, SIZE, np.int32)
            expected = rows(x)[-1]
            wrong.extend(seed for _ in range(20) if not np.array_equal(instance.run(x), expected))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def tasks() -> set[Path]:
    """The threads of this process."""
    return set(Path("/proc/self/task").iterdir())


def test_models_that_show_their_names_to_each_other_stay_apart(make):
    """Both have a pumice_weights and a pumice_run for everyone to see, and each uses its own."""
    other = replace(plan(), weights=np.zeros(ROW, np.uint8))
    libraries = [ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL) for path in (make(), make(plan=other, check=None))]
    turned = np.roll(X, 1 - PASSES)
    for library, expected in zip(libraries, (rows(X)[-1], turned), strict=True):
        with Instance(library, 2) as instance:
            np.testing.assert_array_equal(instance.run(X), expected)


def test_threads_that_wait_go_to_sleep_and_wake_up_again(library):
    before = tasks()
    with Instance(library, 3) as instance:
        np.testing.assert_array_equal(instance.run(X), rows(X)[-1])
        own = tasks() - before
        for _ in range(500):
            if all(_is_asleep(task) for task in own):
                break
            threading.Event().wait(0.01)
        assert len(own) == 2 and all(_is_asleep(task) for task in own)
        np.testing.assert_array_equal(instance.run(X), rows(X)[-1])


def _is_asleep(task: Path) -> bool:
    return (task / "stat").read_text().rpartition(")")[2].split()[0] == "S"


def test_signals_are_not_for_the_threads_of_an_instance(library):
    before = tasks()
    with Instance(library, 3):
        started = tasks() - before
        assert len(started) == 2
        for task in started:
            status = (task / "status").read_text()
            blocked = int(re.search(r"SigBlk:\s*(\w+)", status)[1], 16)
            assert blocked >> (signal.SIGINT - 1) & 1 and blocked >> (signal.SIGTERM - 1) & 1
    assert tasks() <= before


def test_wrong_arguments_are_refused_with_a_sentence(library):
    y, x = np.zeros(SIZE, np.int32), X
    with Instance(library) as instance:
        assert instance.error == ""
        shifted = np.zeros(ROW + 1, np.uint8)[1:]
        for call, says in (
            (lambda: instance.call(None, y), "input 0 ('x') is NULL"),
            (lambda: instance.call(x, None), "output 0 ('y') is NULL"),
            (lambda: instance.call(shifted, y), "input 0 ('x') is not aligned to the 4 bytes of a int32"),
            (lambda: instance.call(x, y, 5, 4), "steps 0 to 21, and 5 to 4 were asked for"),
            (lambda: instance.call(x, y, 0, PASSES + 2), "steps 0 to 21, and 0 to 22"),
            (lambda: library.pumice_run(instance.handle, None, None), "input 0 ('x') is NULL"),
        ):
            assert call() == BAD_ARGUMENT
            assert says in instance.error
        np.testing.assert_array_equal(instance.run(x), rows(x)[-1])
    assert library.pumice_run(None, None, None) == library.pumice_verify(None, None) == BAD_ARGUMENT
    assert b"NULL" in library.pumice_error(None)
    library.pumice_close(None)


@pytest.mark.parametrize("threads", [0, 1025])
def test_thread_counts_out_of_range_are_refused(library, threads):
    instance = Instance(library, threads)
    assert (instance.status, instance.handle.value) == (BAD_ARGUMENT, None)
    assert f"thread count is {threads}" in instance.message


def test_a_message_may_be_left_out_or_cut_off(library):
    handle, short = ctypes.c_void_p(), ctypes.create_string_buffer(b"?" * 8)
    assert library.pumice_open(0, ctypes.byref(handle), None, ctypes.c_uint64(0)) == BAD_ARGUMENT
    assert library.pumice_open(0, ctypes.byref(handle), short, ctypes.c_uint64(4)) == BAD_ARGUMENT
    assert short.raw == b"the\0????\0"
    assert library.pumice_open(1, None, None, ctypes.c_uint64(0)) == BAD_ARGUMENT


@pytest.mark.parametrize("threads", [1, 3])
def test_a_step_that_fails_is_named_and_nobody_waits_for_it(library, threads):
    bad = X.copy()
    bad[0] = -1
    with Instance(library, threads) as instance:
        assert instance.call(bad, np.zeros(SIZE, np.int32)) == DEVICE_FAILED
        assert ("step 3 (pass_3) failed" if threads > 1 else "a step failed") in instance.error
        np.testing.assert_array_equal(instance.run(X), rows(X)[-1])


def test_too_much_memory_is_refused(make):
    plan_of_much = replace(plan(), workspace=1 << 60)
    instance = Instance(load(make(plan=plan_of_much)))
    assert instance.status == NO_MEMORY and "1152921504606" in instance.message


@pytest.mark.parametrize("threads", [1, 2])
def test_a_fork_leaves_the_threads_behind_and_says_so(library, threads):
    with Instance(library, threads) as instance:
        instance.run(X)
        child = os.fork()
        if child == 0:
            status = instance.call(X, np.zeros(SIZE, np.int32))
            instance.library.pumice_close(instance.handle)
            os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (NO_THREADS if threads > 1 else OK)
        instance.run(X)


@pytest.mark.parametrize("threads", [1, 3])
def test_verification_passes_where_the_numbers_are_right(library, threads):
    with Instance(library, threads) as instance:
        instance.run(np.full(SIZE, 9, np.int32))
        assert library.pumice_verify(instance.handle, None) == OK, instance.error


@pytest.mark.parametrize("wrong", [0, 2, PASSES])
def test_verification_names_the_first_wrong_step(make, wrong):
    checksums = [value ^ (i >= wrong) for i, value in enumerate(CHECK.checksums)]
    library = load(make(check=replace(CHECK, checksums=tuple(checksums))))
    with Instance(library, 2) as instance:
        first = ctypes.c_uint32(99)
        assert library.pumice_verify(instance.handle, ctypes.byref(first)) == DIFFERS
        assert first.value == wrong
        assert f"step {wrong} ({library.pumice_step_layer(wrong).decode()})" in instance.error


@pytest.mark.parametrize(("off", "status"), [(0, OK), (1, OK), (2, DIFFERS)])
def test_after_an_inexact_step_the_outputs_are_compared(make, off, status):
    """Wrong checksums from step 5 on are not looked at; integers may be off by one."""
    checksums = tuple(value ^ (i >= 5) for i, value in enumerate(CHECK.checksums))
    check = replace(CHECK, checksums=checksums, exact=5, outputs=(CHECK.outputs[0] + np.int32(off),))
    library = load(make(check=check))
    with Instance(library) as instance:
        first = ctypes.c_uint32()
        assert library.pumice_verify(instance.handle, ctypes.byref(first)) == status
        assert status == OK or (first.value == PASSES and "output 'y'" in instance.error)


FLOATS = """
#include <stdint.h>
int32_t pumice_steps(void **buffers, int32_t first, int32_t last, int32_t task, int32_t tasks) {
    (void)tasks;
    for (int32_t i = 0; first < last && task == 0 && i < 5; i++) ((float *)buffers[4])[i] = ((float *)buffers[3])[i];
    return 0;
}
"""


@pytest.mark.parametrize(
    ("expected", "status"),
    [
        ([100.0, -1, np.inf, np.nan, 0], OK),
        ([100.9, -1.9, np.inf, np.nan, -0.9], OK),
        ([100.0, -2.1, np.inf, np.nan, 0], DIFFERS),
        ([100.0, -1, -np.inf, np.nan, 0], DIFFERS),
        ([100.0, -1, np.inf, 1, 0], DIFFERS),
        ([100.0, np.nan, np.inf, np.nan, 0], DIFFERS),
    ],
)
def test_floats_are_compared_within_the_tolerance(make, expected, status):
    spec = ((5,), "float32")
    stored = np.array([100.0, -1, np.inf, np.nan, 0], np.float32)
    steps = (Step("copy", (View(FIRST_INPUT), View(FIRST_INPUT + 1)), "", (20,)),)
    check = Check((stored,), (0,), 0, (np.array(expected, np.float32),), 0.01)
    library = load(make(FLOATS, plan=Plan({}, steps, np.zeros(0, np.uint8), 0, (spec,), (spec,)), check=check))
    with Instance(library) as instance:
        assert library.pumice_verify(instance.handle, None) == status


def test_a_model_of_nothing_is_a_library_too(make):
    code = "#include <stdint.h>\nint32_t pumice_steps(void **b, int32_t f, int32_t l, int32_t t, int32_t n) {\n"
    code += "    (void)b, (void)f, (void)l, (void)t, (void)n;\n    return 0;\n}\n"
    empty = Plan({}, (), np.zeros(0, np.uint8), 0, (), ())
    library = load(make(code, plan=empty, inputs=[], outputs=[], check=None))
    assert not library.pumice_input(0) and library.pumice_step_layer(0) is None
    with Instance(library, 2) as instance:
        assert library.pumice_run(instance.handle, None, None) == OK
        assert library.pumice_verify(instance.handle, None) == BAD_ARGUMENT
        assert "stores no input" in instance.error


def test_the_cpu_is_asked_for_every_known_instruction_set(make):
    """The words that the runtime misses are those that /proc/cpuinfo does not list."""
    known = set(LLVM_TO_CPUINFO[host_architecture()].values())
    for word in known:
        source = RUNTIME.joinpath("cpu_features.c").read_text()
        assert f'{{"{word}", ' in source, word
    present, missing = known & host_features(), known - host_features()
    with Instance(load(make(features=present))):
        pass
    refused = Instance(load(make(features=known | {"flying"})))
    assert refused.status == WRONG_CPU
    listed = re.search(r"lacks (.*), for which", refused.message)[1]
    assert set(listed.split(", ")) == missing | {"flying"}


def test_only_the_interface_is_visible(make):
    elf = Elf.read(make())
    declared = set(re.findall(r"PUMICE_API [^;(]*\b(pumice_\w+)\(", RUNTIME.joinpath("pumice.h").read_text()))
    assert elf.exported == declared | {"pumice_weights"}
    assert not any(name.startswith(("__tls", "_ITM", "__gmon", "TVM")) for name in elf.undefined)
    assert not {name for name in elf.needed if not re.match(r"(libc|libm|libpthread)\.", name)}


def test_what_is_not_there_is_no_library(make):
    with pytest.raises(MissingDependencyError, match="no_such_function"):
        make(STEPS.replace("return -1", "return no_such_function()"), flags=["-w"])


@pytest.mark.parametrize("libc", [None, "glibc-2.17", "musl"])
@pytest.mark.parametrize("name", ["x86-64", "armv8-a"])
def test_every_compiler_builds_it_without_a_warning(make, name, libc):
    target = replace(Target.parse(name), features=frozenset())
    try:
        path = make(flags=["-pedantic", "-Wno-unused-command-line-argument"], target=target, libc=libc)
    except MissingDependencyError as error:
        if "none was found" not in str(error):
            raise
        pytest.skip(str(error))
    elf = Elf.read(path)
    assert elf.machine == target.architecture
    assert {library.partition(".")[0] for library in elf.needed} <= {"libc", "libm", "libpthread"}


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++: apt-get install g++")
def test_the_header_is_c_and_cpp_of_every_age(tmp_path):
    source = tmp_path / "user.c"
    source.write_text('#include "pumice.h"\nint main(void) { return PUMICE_OK; }\n')
    for compiler in (
        ["gcc", "-std=c99"],
        ["gcc", "-std=c11"],
        ["g++", "-xc++", "-std=c++11"],
        ["g++", "-xc++", "-std=c++20"],
    ):
        command = [*compiler, "-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{RUNTIME}", str(source)]
        subprocess.run([*command, "-o", str(tmp_path / "user")], check=True)
