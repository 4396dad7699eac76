"""What the CPU of this machine can do, in the words of /proc/cpuinfo.

The kernel drops a flag there when it does not save the registers behind it (no ``avx`` without XSAVE), and a
hypervisor that masks an instruction masks its flag; so the flags are what a program may really use, where the
CPU's model name, which LLVM goes by, is not.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tvm.target import Target as TVMTarget
from tvm.target.codegen import llvm_get_cpu_features, llvm_get_system_cpu

from pumice.loader import host_architecture, parse_cpuinfo

__all__ = [
    "LLVM_TO_CPUINFO",
    "cpuinfo_words",
    "host_architecture",
    "host_cpu",
    "host_features",
    "native_attributes",
    "parse_cpuinfo",
]

_CPUINFO = Path("/proc/cpuinfo")

# LLVM's name -> the kernel's name, for what LLVM may emit on its own account.
LLVM_TO_CPUINFO = {
    "x86_64": {
        "sse3": "pni",
        "ssse3": "ssse3",
        "sse4.1": "sse4_1",
        "sse4.2": "sse4_2",
        "sse4a": "sse4a",
        "popcnt": "popcnt",
        "lzcnt": "abm",
        "movbe": "movbe",
        "bmi": "bmi1",
        "bmi2": "bmi2",
        "tbm": "tbm",
        "avx": "avx",
        "f16c": "f16c",
        "fma": "fma",
        "fma4": "fma4",
        "xop": "xop",
        "avx2": "avx2",
        "avxvnni": "avx_vnni",
        "gfni": "gfni",
        "avx512f": "avx512f",
        "avx512cd": "avx512cd",
        "avx512bw": "avx512bw",
        "avx512dq": "avx512dq",
        "avx512vl": "avx512vl",
        "avx512ifma": "avx512ifma",
        "avx512vbmi": "avx512vbmi",
        "avx512vbmi2": "avx512_vbmi2",
        "avx512vnni": "avx512_vnni",
        "avx512bitalg": "avx512_bitalg",
        "avx512vpopcntdq": "avx512_vpopcntdq",
        "avx512bf16": "avx512_bf16",
        "avx512fp16": "avx512_fp16",
    },
    "aarch64": {
        "neon": "asimd",
        "lse": "atomics",
        "rdm": "asimdrdm",
        "dotprod": "asimddp",
        "fullfp16": "asimdhp",
        "i8mm": "i8mm",
        "bf16": "bf16",
        "sve": "sve",
        "sve2": "sve2",
    },
}


@cache
def host_features() -> frozenset[str]:
    """The instruction sets that every core of this machine has, in /proc/cpuinfo's words."""
    if not _CPUINFO.exists():  # not Linux: LLVM knows the CPU by its model
        return cpuinfo_words(TVMTarget({"kind": "llvm", "mcpu": llvm_get_system_cpu()}), host_architecture())
    return parse_cpuinfo(_CPUINFO.read_text(errors="replace"))


@cache
def host_cpu() -> str:
    """The model of this machine's CPU, as its maker calls it; LLVM's name where the system does not say."""
    text = _CPUINFO.read_text(errors="replace") if _CPUINFO.exists() else ""
    for key, _, value in (line.partition(":") for line in text.splitlines()):
        if key.strip() == "model name":
            return value.strip()
    return str(llvm_get_system_cpu())


def native_attributes(architecture: str, features: frozenset[str]) -> list[str]:
    """LLVM's ``+feature`` / ``-feature`` for everything known, so that code follows the flags, not the model."""
    known = LLVM_TO_CPUINFO.get(architecture, {})
    return [("+" if word in features else "-") + feature for feature, word in known.items()]


def cpuinfo_words(target: TVMTarget, architecture: str) -> frozenset[str]:
    """What code for an LLVM target may use, in /proc/cpuinfo's words."""
    known = LLVM_TO_CPUINFO.get(architecture, {})
    return frozenset(known[feature] for feature in llvm_get_cpu_features(target) if feature in known)
