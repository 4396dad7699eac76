"""Every kernel as it is emitted for ARM, executed by QEMU: the tests of this folder once more, unchanged.

Each file of tests is loaded again with ARM's instruction sets in place of this machine's. What has no examples drawn
runs together in one emulated process; the rest are the slow ones.
"""

import importlib.util
import itertools
from functools import partial
from pathlib import Path

import arm
import kernels
import numpy as np
import pytest

from pumice.schedules.geometry import Window
from pumice.targets.isa import isa

pytestmark = arm.needs_emulation

# What differs between the instruction sets is how bytes are multiplied, and how they are packed.
OF_BYTES = ("convolution", "gemv", "epilogue", "layout", "pooling", "elementwise", "packed_norm")
OF_FLOATS = ("attention", "float_kernels", "gather", "pointwise")
LONG = ("epilogue", "attention")
FILES = [*itertools.product(arm.TARGETS, OF_BYTES), *itertools.product(["neon"], OF_FLOATS)]


def loaded(name, isa_name):
    """The file of tests ``name`` for ``isa_name`` alone."""
    known = {key: getattr(kernels, key) for key in ("ALL_ISAS", "RUNNABLE")}
    spec = importlib.util.spec_from_file_location(f"{name}_for_{isa_name}", Path(__file__).with_name(f"test_{name}.py"))
    module = importlib.util.module_from_spec(spec)
    try:
        kernels.ALL_ISAS = kernels.RUNNABLE = [isa_name]
        spec.loader.exec_module(module)
    finally:
        vars(kernels).update(known)
    return module


def functions_of(module, drawn):
    """Its tests that draw examples, or those that do not, by name."""
    found = {name: test for name, test in vars(module).items() if name.startswith("test_")}
    return {name: test for name, test in found.items() if hasattr(test, "hypothesis") == drawn}


def cases_of(name, test):
    """A test once for each combination of its parameters."""
    choices = []
    for mark in getattr(test, "pytestmark", []):
        names, values = mark.args
        names = [part.strip() for part in names.split(",")] if isinstance(names, str) else list(names)
        choices.append([dict(zip(names, value if len(names) > 1 else [value], strict=True)) for value in values])
    for combination in itertools.product(*choices):
        parameters = {key: value for part in combination for key, value in part.items()}
        yield f"{name}({parameters})", partial(test, **parameters)


def cases_for(isa_name, name):
    """All cases of the file ``name``."""
    found = functions_of(loaded(name, isa_name), drawn=False)
    return dict(case for pair in found.items() for case in cases_of(*pair))


@pytest.mark.parametrize(("isa_name", "name"), [pair for pair in FILES if pair[1] not in LONG])
def test_kernels(isa_name, name):
    arm.together(isa_name, cases_for(isa_name, name))


@pytest.mark.parametrize(("isa_name", "name"), [("dotprod", "epilogue"), ("i8mm", "attention")])
def test_some_of_the_kernels_that_take_long(isa_name, name):
    arm.together(isa_name, dict(list(cases_for(isa_name, name).items())[::7]))


@pytest.mark.slow
@pytest.mark.parametrize(("isa_name", "name"), [pair for pair in FILES if pair[1] in LONG])
def test_kernels_that_take_long(isa_name, name):
    arm.together(isa_name, cases_for(isa_name, name))


@pytest.mark.slow
@pytest.mark.parametrize(("isa_name", "name"), FILES)
def test_drawn_examples(isa_name, name):
    for test in functions_of(loaded(name, isa_name), drawn=True).values():
        test()


@pytest.mark.parametrize("isa_name", arm.TARGETS)
def test_layers(isa_name):
    """What x86 has no tests of its own for: two rows that share a block, and sums of two products at their largest."""
    check = loaded("convolution", isa_name).check_int8
    window = Window((3, 3), padding=(1, 1))
    cases = {"2x4": partial(check, isa_name, 1, (1, 22, 11, 27), 13, window, "2x4", residual=True)}
    for pair, stored in itertools.product([(-128, -127), (-128, -128), (127, 127)], [0, 255]):
        x, weight = (
            np.full((1, 16, 3, 9), stored, np.uint8),
            np.tile(np.array(pair, np.int8), 128).reshape(16, 16, 1, 1),
        )
        case = partial(check, isa_name, 2, x.shape, 16, Window((1, 1)), x=x, weight=weight, zx=0, output="float32")
        cases |= {f"{form} {pair} {stored}": partial(case, form) for form in ("dense", "1x4")}
    arm.together(isa_name, cases)


@pytest.mark.parametrize("isa_name", ["vnni512", "avx2", *arm.TARGETS])
def test_twins_compute_the_same_bytes_here(isa_name, monkeypatch):
    monkeypatch.setattr(kernels, "isa", lambda name: isa(name).twin())
    monkeypatch.setattr(arm, "TARGETS", {})
    monkeypatch.setitem(kernels.TARGETS, isa_name, "native")
    layers, vectors = loaded("convolution", isa_name), loaded("gemv", isa_name)
    for form in layers.FORMS:
        layers.check_int8(isa_name, 1, (2, 22, 5, 11), 13, Window((3, 3), padding=(1, 1)), form, residual=True)
    for sparse in (False, True):
        vectors.check_int8(isa_name, 1, 37, 151, sparse, residual=True)
