"""How many instructions the ARM kernels execute for each useful multiply-add, dense and sparse.

    python -m bench.arm_instructions [--layers 'linear*'] [--targets armv8-a] [--json out.json]

Time under emulation says nothing, instructions do: what is counted is exactly what a CPU would execute. qemu runs one
layer's step an instruction at a time and writes down where each lies; those in the layer's kernel count, by what they
are. A multiply-add is useful if its weight is not zero, or the layer is dense. Needs qemu-user and ziglang.
"""

from __future__ import annotations

import argparse
import json
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from bench.boxes import qemu
from bench.layer_shapes import PATTERNS, LayerShape
from bench.tables import markdown, number
from pumice.frontend import read_model
from pumice.module import layers_of
from pumice.passes.choose_kernel import Chooser
from pumice.passes.link_steps import link_steps
from pumice.passes.pipeline import LowerOptions, lower
from pumice.prepare import prepare
from pumice.recipe import Recipe
from pumice.schedules.tiling import FORMS
from pumice.stages import Stages
from pumice.targets.build import build
from pumice.targets.plan import Plan
from pumice.targets.target import Target
from pumice.targets.toolchain import find_toolchain

TARGETS = ("armv8-a", "armv8.2-a+dotprod", "armv8.6-a+i8mm")
ZEROS = 0.9
LAYERS = {
    shape.name: shape for shape in (LayerShape(768, 96, 128), LayerShape(64, 64, 196, 3), LayerShape(1024, 512, 1))
}

_DRIVER = Path(__file__).with_suffix(".c")

# A64 instructions by the bits under a mask: products of bytes, and whatever loads or stores.
_PRODUCTS = (
    (0x9FE0FC00, 0x0E809400),  # sdot, udot
    (0xBFE0FC00, 0x0E809C00),  # usdot
    (0xBFC0F400, 0x0F80E000),  # sdot by lane
    (0xBFC0F400, 0x0F80F000),  # usdot by lane
    (0x9FE0F400, 0x0E80A400),  # smmla, usmmla
    (0xBFE0FC00, 0x0E20C000),  # smull
    (0xBFE0FC00, 0x0E208000),  # smlal
)
_MEMORY = ((0x0A000000, 0x08000000),)

_EXECUTED = re.compile(rb"\[[0-9a-f]+/([0-9a-f]+)/.*\] (\S+)$")


@dataclass(frozen=True)
class Count:
    """One kernel, run once."""

    layer: str
    target: str
    isa: str
    pattern: str
    zeros: float
    kernel: str
    useful: int  # multiply-adds
    instructions: int
    products: int  # of them, those that multiply bytes
    memory: int  # of them, those that load or store

    @property
    def per_sixteen(self) -> float:
        """Instructions for sixteen useful multiply-adds, which one ``sdot`` does."""
        return 16 * self.instructions / self.useful


def count(shape: LayerShape, pattern: str, target: Target, folder: Path) -> Count:
    """Compile one layer and run its kernel once, in ``folder``."""
    is_dense = pattern == "dense"
    zeros, rows = (0.0, 1) if is_dense else (ZEROS, PATTERNS[pattern])
    mod = prepare(read_model(shape.model(shape.weight(zeros, rows)), None), Recipe(), None, None, Stages(None))
    forms = [form for form in FORMS if form.is_dense == is_dense]
    lowered = lower(mod, target, LowerOptions(1, Chooser(forms)))
    plan = link_steps(lowered)
    (step,) = (number for number, step in enumerate(plan.steps) if step.layer)
    (layer,) = layers_of(lowered).values()
    program = _program(plan, target, folder)
    executed = _executed(program, step, {plan.steps[step].kernel})
    words = _words(program, executed)

    def those(kinds: Sequence[tuple[int, int]]) -> int:
        return sum(n for pc, n in executed.items() if any(words[pc] & mask == bits for mask, bits in kinds))

    useful = round(shape.macs * (1 - zeros))
    return Count(
        shape.name, target.name, target.isa, pattern, zeros, layer.kernel, useful, executed.total(), those(_PRODUCTS),
        those(_MEMORY),
    )  # fmt: skip


def _program(plan: Plan, target: Target, folder: Path) -> Path:
    """A static program at fixed addresses around the plan's code."""
    code = build(plan, target, for_tvm=False)
    code.module.write_to_file(str(folder / "code.o"))
    plan.weights.tofile(folder / "weights")
    sizes = {"WEIGHTS": plan.weights.nbytes, "WORKSPACE": plan.workspace, "SCRATCH": code.scratch}
    for name, ((shape, dtype),) in (("INPUT", plan.inputs), ("OUTPUT", plan.outputs)):
        sizes[name] = int(np.prod(shape)) * np.dtype(dtype).itemsize
    command = [*find_toolchain(target, "musl").command, "-O2", "-static", "-no-pie"]
    command += [f"-D{name}={size}" for name, size in sizes.items()]
    subprocess.run([*command, "-o", "program", _DRIVER, "code.o", "-lm"], cwd=folder, check=True)
    return folder / "program"


def _executed(program: Path, step: int, kernels: set[str]) -> Counter[int]:
    """How often each instruction of the functions that belong to ``kernels`` runs, by address."""
    known = subprocess.run([qemu(), "-h"], capture_output=True, check=True).stdout
    single = "-one-insn-per-tb" if b"one-insn-per-tb" in known else "-singlestep"
    command = [qemu(), "-cpu", "max", single, "-d", "exec,nochain", program, program.with_name("weights")]
    counts: Counter[int] = Counter()
    with subprocess.Popen([*command, str(step), str(step + 1)], stderr=subprocess.PIPE) as running:
        assert running.stderr is not None
        for line in running.stderr:
            found = _EXECUTED.search(line)
            if found and any(found[2].decode().startswith(name) for name in kernels):
                counts[int(found[1], 16)] += 1
    if running.returncode:
        raise subprocess.CalledProcessError(running.returncode, command)
    return counts


def _words(program: Path, addresses: Iterable[int]) -> dict[int, int]:
    """The instruction at each address, out of the program's loaded segments."""
    data = program.read_bytes()
    table, size, entries = struct.unpack_from("<32xQ14xHH", data)
    segments = [struct.unpack_from("<IIQQQQ", data, table + size * i) for i in range(entries)]
    found = {}
    for address in addresses:
        offset = next(o + address - v for kind, _, o, v, _, n in segments if kind == 1 and v <= address < v + n)
        (found[address],) = struct.unpack_from("<I", data, offset)
    return found


def table(counts: Sequence[Count]) -> str:
    """Markdown: a line for each layer and kind of weight, instructions for sixteen useful multiply-adds by target.

    In brackets: how many times fewer than the dense kernel needs for the whole layer.
    """
    sets = list(dict.fromkeys(entry.isa for entry in counts))
    found = {(entry.layer, entry.pattern, entry.isa): entry for entry in counts}
    rows = [["layer", "weights", *sets]]
    for layer, pattern in dict.fromkeys((entry.layer, entry.pattern) for entry in counts):
        cells = []
        for name in sets:
            entry, dense = found[layer, pattern, name], found[layer, "dense", name]
            cells.append(number(entry.per_sixteen, 2))
            if entry is not dense:
                cells[-1] += f" ({dense.instructions / entry.instructions:.1f})"
        rows.append([layer, "dense" if pattern == "dense" else f"{pattern}, {ZEROS:.0%} zero", *cells])
    return markdown(rows)


def main() -> None:
    """Count every layer, target and pattern."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", default=["*"], metavar="GLOB", help=f"of {'; '.join(LAYERS)}")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts there too")
    options = parser.parse_args()
    counts = []
    for name, shape in LAYERS.items():
        if not any(fnmatchcase(name, glob) for glob in options.layers):
            continue
        for target in map(Target.parse, options.targets):
            for pattern in ("dense", *PATTERNS):
                with tempfile.TemporaryDirectory(prefix="pumice-") as folder:
                    counts.append(count(shape, pattern, target, Path(folder)))
    print(table(counts))
    if options.json:
        options.json.write_text(json.dumps([asdict(entry) for entry in counts], indent=2) + "\n")


if __name__ == "__main__":
    main()
