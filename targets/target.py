"""The devices that a model is compiled for, by the names that the command line takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

import tvm
from tvm.target.codegen import llvm_get_system_cpu, llvm_is_valid_cpu

from pumice.errors import UnsupportedError
from pumice.targets.boards import NO_SVE, WIDE, Gpu, cpus, gpus
from pumice.targets.detect import cpuinfo_words, host_architecture, host_features, native_attributes
from pumice.targets.isa import Isa, isa

_TRIPLES = {"x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu"}

# LLVM 22's loop vectorizer takes `x[i % 4]` for `x[i]` where the modulus is a power of two and the vector longer:
# a tile of a small tensor came out wrong on AVX-512. The kernels write their vectors out and do not need it.
_NO_LOOP_VECTORIZER = "-vectorize-loops=false"

# Lists of blocks are short and no two are alike: a loop unrolled for an unknown count ends in two branches that cannot
# be predicted where the plain loop ends in one.
_NO_REMAINDER_LOOPS = "-unroll-runtime=false"

# Instruction sets of the kernels (``targets/isa.py``) with what each needs, the best first.
_PRODUCTS: dict[str, tuple[tuple[str, frozenset[str]], ...]] = {
    "x86_64": (
        ("vnni512", frozenset({"avx512_vnni", "avx512bw", "avx512vl"})),
        ("avxvnni", frozenset({"avx_vnni", "avx2", "fma"})),
        ("avx512bw", frozenset({"avx512bw", "avx512vl"})),
        ("avx2", frozenset({"avx2", "fma"})),
        ("portable", frozenset()),
    ),
    "aarch64": (
        ("i8mm", frozenset({"i8mm"})),
        ("dotprod", frozenset({"asimddp"})),
        ("neon", frozenset({"asimd"})),
        ("portable", frozenset()),
    ),
}


@dataclass(frozen=True)
class Target:
    """One kind of device: what LLVM or CUDA generates code for, and what the kernels may use.

    name: as the user gave it
    tvm: TVM's target, of kind ``llvm`` or ``cuda``; the latter has the CPU that the GPU stands beside as its ``host``
    isa: the int8 dot product of the kernels, the best that ``features`` allow. x86: ``vnni512`` (AVX-512 VNNI,
        64 products an instruction), ``avxvnni`` (32), ``avx512bw`` and ``avx2`` (products widened to 16 bits, never
        the saturating ``vpmaddubsw``); ARM: ``i8mm``, ``dotprod``, ``neon``; ``portable`` (plain code); ``cuda``
    features: the instruction sets that a CPU must have to run the code, in /proc/cpuinfo's words: ``avx512_vnni``
    kind: ``cpu`` or ``cuda``
    gpus: the CUDA architectures that a library has code for, ``sm_80``; none for a CPU
    is_twin: whether the kernels are those of ``isa`` in plain arithmetic, and ``tvm`` is this machine
    """

    name: str
    tvm: tvm.target.Target
    isa: str
    features: frozenset[str]
    kind: str = "cpu"
    gpus: tuple[str, ...] = ()
    is_twin: bool = False

    @classmethod
    def parse(cls, text: str) -> Target:
        """``native``, a name that ``Target.names()`` lists, or a TVM target of kind ``llvm`` as JSON or tag.

        A GPU may name the CPU that it stands beside: ``sm_90@armv8-a``. Raises UnsupportedError for a name that is
        none of these and for a kind of device without kernels.
        """
        if text == "native":
            return native_target(host_architecture(), host_features())
        if text in cpus():
            cpu = cpus()[text]
            return _of_llvm(text, cpu.architecture, cpu.model, list(cpu.attributes))
        gpu, beside, host = text.partition("@")
        if gpu in gpus() and (not beside or host in cpus()):
            return _of_cuda(text, gpus()[gpu], Target.parse(host or gpus()[gpu].host))
        return _of_tvm(text)

    @staticmethod
    def names() -> list[str]:
        """The names that ``parse`` knows, besides TVM's own."""
        return ["native", *cpus(), *gpus()]

    @property
    def instructions(self) -> Isa:
        """What kernels need to know of ``isa``."""
        found = isa(self.isa)
        return found.twin() if self.is_twin else found

    @property
    def runs_on_gpu(self) -> bool:
        """Whether kernels are bound to a GPU's threads; those of the twin are not."""
        return self.kind == "cuda"

    @property
    def has_tensor_cores(self) -> bool:
        """Whether every GPU that there is code for has tensor cores that the kernels use: from sm_80 on."""
        return self.runs_on_gpu and all(int(gpu.removeprefix("sm_")) >= 80 for gpu in self.gpus)

    @property
    def runs_here(self) -> bool:
        """Whether this machine's CPU has what the code needs."""
        return self.kind == "cpu" and self.architecture == host_architecture() and self.features <= host_features()

    def twin(self) -> Target:
        """This target as any machine can stand in for it: the same kernels on the same bytes, computed here."""
        here = Target.parse("native")
        return replace(self, tvm=here.tvm, features=here.features, kind="cpu", gpus=(), is_twin=True)

    @property
    def architecture(self) -> str:
        """``x86_64`` or ``aarch64``; of a GPU's machine that of its CPU."""
        return _architecture(self.triple)

    @property
    def triple(self) -> str:
        """LLVM's triple of the CPU: architecture, system and ABI."""
        cpu = self.tvm if self.kind == "cpu" else self.tvm.host
        return str(cpu.attrs["mtriple"])


def native_target(architecture: str, features: frozenset[str]) -> Target:
    """The machine at hand: LLVM's tuning for its model, and exactly the instructions that its flags list."""
    if architecture not in _TRIPLES:
        raise UnsupportedError(
            f"target 'native': this machine is {architecture}, and only {', '.join(_TRIPLES)} are supported"
        )
    cpu = str(llvm_get_system_cpu())
    if not llvm_is_valid_cpu(cpu, _TRIPLES[architecture]):
        cpu = "x86-64" if architecture == "x86_64" else "generic"
    attributes = native_attributes(architecture, features)
    attributes.append(WIDE if architecture == "x86_64" else NO_SVE)
    return _of_llvm("native", architecture, cpu, attributes)


def _of_llvm(name: str, architecture: str, cpu: str, attributes: list[str]) -> Target:
    config: dict[str, Any] = {"kind": "llvm", "mtriple": _TRIPLES[architecture], "mcpu": cpu}
    if attributes:
        config["mattr"] = attributes
    return _wrap(name, tvm.target.Target(config), architecture)


def _of_cuda(name: str, gpu: Gpu, host: Target) -> Target:
    """Kernels written for the oldest of the architectures; nvcc compiles them for each."""
    device = tvm.target.Target({"kind": "cuda", "arch": gpu.architectures[0]}, host=host.tvm)
    return Target(name, device, "cuda", host.features, "cuda", gpu.architectures)


def _of_tvm(text: str) -> Target:
    try:
        target = tvm.target.Target(text)
    except (ValueError, TypeError, RuntimeError) as error:
        why = str(error).strip().splitlines()[0].split(" Target creation from string failed")[0].rstrip(".")
        raise UnsupportedError(
            f"target '{text}' is not known ({why}): `pumice targets` lists the names{_alike(text)}, and a TVM "
            'target is given as JSON, such as \'{"kind": "llvm", "mcpu": "znver4"}\''
        ) from error
    if str(target.kind.name) != "llvm":
        raise UnsupportedError(
            f"target '{text}': TVM targets of kind '{target.kind.name}' have no kernels here: give one of kind 'llvm', "
            "or a name that `pumice targets` lists"
        )
    config = {"kind": "llvm", **{str(key): value for key, value in target.attrs.items()}}
    triple = str(config.get("mtriple", _TRIPLES.get(host_architecture(), host_architecture())))
    architecture = _architecture(triple)
    if architecture not in _TRIPLES:
        raise UnsupportedError(
            f"target '{text}': no kernels for the architecture of '{triple}', only for {', '.join(_TRIPLES)}"
        )
    cpu = str(config.get("mcpu", "generic"))
    if not llvm_is_valid_cpu(cpu, triple):  # TVM would log a line and compile for another CPU
        raise UnsupportedError(f"target '{text}': LLVM knows no {architecture} CPU called '{cpu}'")
    if "mtriple" not in config:
        target = tvm.target.Target({**config, "mtriple": _TRIPLES[architecture]})
    return _wrap(text, target, architecture)


def _wrap(name: str, target: tvm.target.Target, architecture: str) -> Target:
    config = {"kind": "llvm", **{str(key): value for key, value in target.attrs.items()}}
    config["cl-opt"] = [*map(str, config.get("cl-opt", [])), _NO_LOOP_VECTORIZER, _NO_REMAINDER_LOOPS]
    target = tvm.target.Target(config)
    features = cpuinfo_words(target, architecture)
    return Target(name, target, _choose_isa(architecture, features), features)


def _choose_isa(architecture: str, features: frozenset[str]) -> str:
    """The first whose needs the features meet."""
    return next(name for name, needs in _PRODUCTS[architecture] if needs <= features)


def _architecture(triple: str) -> str:
    first = triple.split("-")[0]
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(first, first)


def _alike(text: str) -> str:
    close = get_close_matches(text, Target.names())
    return f" (like yours: {', '.join(close)})" if close else ""
