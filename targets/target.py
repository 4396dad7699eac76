"""The devices that a model is compiled for, by the names that the command line takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm
from tvm.target.codegen import llvm_get_system_cpu, llvm_is_valid_cpu

from pumice.errors import UnsupportedError
from pumice.targets.detect import cpuinfo_words, host_architecture, host_features, native_attributes

_TRIPLES = {"x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu"}

# LLVM tunes x86-64-v4 for vectors of 256 bits; the kernels count on 512.
_WIDE = "-prefer-256-bit"

# LLVM 22's loop vectorizer takes `x[i % 4]` for `x[i]` where the modulus is a power of two and the vector longer:
# a tile of a small tensor came out wrong on AVX-512. The kernels write their vectors out and do not need it.
_NO_LOOP_VECTORIZER = "-vectorize-loops=false"

# Lists of blocks are short and no two are alike: a loop unrolled for an unknown count ends in two branches that cannot
# be predicted where the plain loop ends in one.
_NO_REMAINDER_LOOPS = "-unroll-runtime=false"

# Name -> architecture, LLVM's CPU, LLVM's attributes.
_NAMED: dict[str, tuple[str, str, list[str]]] = {
    "x86-64": ("x86_64", "x86-64", []),
    "x86-64-v2": ("x86_64", "x86-64-v2", []),
    "x86-64-v3": ("x86_64", "x86-64-v3", []),
    "x86-64-v3-avxvnni": ("x86_64", "x86-64-v3", ["+avxvnni"]),
    "x86-64-v4": ("x86_64", "x86-64-v4", [_WIDE]),
    "x86-64-v4-vnni": ("x86_64", "x86-64-v4", ["+avx512vnni", _WIDE]),
    "armv8-a": ("aarch64", "generic", ["+neon"]),
    "armv8.2-a+dotprod": ("aarch64", "generic", ["+v8.2a", "+neon", "+dotprod"]),
}


@dataclass(frozen=True)
class Target:
    """One kind of CPU: what LLVM generates code for, and what the kernels may use.

    ``isa`` is the int8 dot product of the kernels, the best that ``features`` allow: ``vnni512`` (AVX-512 VNNI,
    64 products an instruction), ``avxvnni`` (32), ``avx512bw`` and ``avx2`` (products widened to 16 bits, never
    the saturating ``vpmaddubsw``), ``portable`` (plain code). ``features`` are the instruction sets that a CPU
    must have to run the code, in /proc/cpuinfo's words: ``avx512_vnni``, ``asimddp``.
    """

    name: str
    tvm: tvm.target.Target
    isa: str
    features: frozenset[str]

    @classmethod
    def parse(cls, text: str) -> Target:
        """``native``, a name that ``Target.names()`` lists, or a TVM target of kind ``llvm`` as JSON or tag.

        Raises UnsupportedError for a name that is none of these and for a kind of device without kernels.
        """
        if text == "native":
            return native_target(host_architecture(), host_features())
        if text in _NAMED:
            architecture, cpu, attributes = _NAMED[text]
            return _of_llvm(text, architecture, cpu, attributes)
        if text.startswith("sm_"):
            raise UnsupportedError(
                f"target '{text}': NVIDIA GPUs are not supported yet; this version compiles for CPUs: {_listed()}"
            )
        return _of_tvm(text)

    @staticmethod
    def names() -> list[str]:
        """The names that ``parse`` knows, besides TVM's own."""
        return ["native", *_NAMED]

    @property
    def architecture(self) -> str:
        """``x86_64`` or ``aarch64``."""
        return _architecture(str(self.tvm.attrs["mtriple"]))

    @property
    def triple(self) -> str:
        """LLVM's triple: architecture, system and ABI."""
        return str(self.tvm.attrs["mtriple"])


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
    if architecture == "x86_64":
        attributes.append(_WIDE)
    return _of_llvm("native", architecture, cpu, attributes)


def _of_llvm(name: str, architecture: str, cpu: str, attributes: list[str]) -> Target:
    config: dict[str, Any] = {"kind": "llvm", "mtriple": _TRIPLES[architecture], "mcpu": cpu}
    if attributes:
        config["mattr"] = attributes
    return _wrap(name, tvm.target.Target(config), architecture)


def _of_tvm(text: str) -> Target:
    try:
        target = tvm.target.Target(text)
    except (ValueError, TypeError, RuntimeError) as error:
        why = str(error).strip().splitlines()[0].split(" Target creation from string failed")[0].rstrip(".")
        raise UnsupportedError(
            f"target '{text}' is not known ({why}); use one of {_listed()}, or a TVM target as JSON, "
            'such as \'{"kind": "llvm", "mcpu": "znver4"}\''
        ) from error
    if str(target.kind.name) != "llvm":
        raise UnsupportedError(
            f"target '{text}': TVM targets of kind '{target.kind.name}' are not supported yet, only kind 'llvm'"
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
    return Target(name, target, _choose_isa(features) if architecture == "x86_64" else "portable", features)


def _choose_isa(features: frozenset[str]) -> str:
    if {"avx512_vnni", "avx512bw", "avx512vl"} <= features:
        return "vnni512"
    if {"avx_vnni", "avx2"} <= features:
        return "avxvnni"
    if {"avx512bw", "avx512vl"} <= features:
        return "avx512bw"
    return "avx2" if "avx2" in features else "portable"


def _architecture(triple: str) -> str:
    first = triple.split("-")[0]
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(first, first)


def _listed() -> str:
    return ", ".join(Target.names())
