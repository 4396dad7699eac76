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
import pytest

pytestmark = arm.needs_emulation

# What differs between the instruction sets is how bytes are multiplied, and how they are packed.
OF_BYTES = ("convolution", "gemv", "epilogue", "layout", "pooling", "elementwise", "packed_norm")
OF_FLOATS = ("attention", "float_kernels", "gather", "pointwise")
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


def tests_of(module, drawn):
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


@pytest.mark.parametrize(("isa_name", "name"), FILES)
def test_kernels(isa_name, name):
    module = loaded(name, isa_name)
    arm.together(isa_name, dict(c for pair in tests_of(module, drawn=False).items() for c in cases_of(*pair)))


@pytest.mark.slow
@pytest.mark.parametrize(("isa_name", "name"), FILES)
def test_drawn_examples(isa_name, name):
    for test in tests_of(loaded(name, isa_name), drawn=True).values():
        test()
