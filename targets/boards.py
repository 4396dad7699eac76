"""The devices that ``--target`` knows by name: what LLVM is told of each, and what is in it.

Cores and caches are the makers': Linux's device trees for boards (``arch/arm64/boot/dts``), data sheets for servers.
Nothing is generated from them; they are for who chooses a target. ``docs/targets.md`` shows the table.
"""

from __future__ import annotations

from dataclasses import dataclass

# LLVM tunes AVX-512 CPUs for vectors of 256 bits; the kernels count on 512.
WIDE = "-prefer-256-bit"

# The kernels are NEON's. Without this LLVM may use SVE where a vector is divided or converted, and a library for one
# board would need more than the next one has.
NO_SVE = "-sve"


@dataclass(frozen=True)
class Cpu:
    """A kind of CPU: an instruction set level, or that of a board or server.

    name: what ``--target`` takes
    title: which devices it is for
    architecture: ``x86_64`` or ``aarch64``
    model: LLVM's CPU, for whose pipeline it schedules
    attributes: LLVM's, on top of the model's own
    cores: of the device, 0 for a level
    l1d, l2, l3: KiB of the data caches, 0 for none or not known; L1 is each core's own, and so is L2 unless
        ``l2_is_shared``; L3 belongs to all, or to a cluster where the title says so
    """

    name: str
    title: str
    architecture: str
    model: str
    attributes: tuple[str, ...] = ()
    cores: int = 0
    l1d: int = 0
    l2: int = 0
    l3: int = 0
    l2_is_shared: bool = False


@dataclass(frozen=True)
class Gpu:
    """A CUDA architecture, or all of them (``cuda``), usually beside a CPU of the level ``host``."""

    name: str
    title: str
    architectures: tuple[str, ...]
    host: str = "x86-64"


_X86 = "x86_64"
_ARM = "aarch64"

LEVELS = (
    Cpu("x86-64", "any 64-bit x86", _X86, "x86-64"),
    Cpu("x86-64-v2", "SSE 4.2, from 2009 on", _X86, "x86-64-v2"),
    Cpu("x86-64-v3", "AVX2: Intel from 2013 on, AMD from 2015 on", _X86, "x86-64-v3"),
    Cpu("x86-64-v3-avxvnni", "AVX2 and AVX-VNNI: Intel Alder Lake, N100, AMD Zen 5", _X86, "x86-64-v3", ("+avxvnni",)),
    Cpu("x86-64-v4", "AVX-512: Intel Skylake-SP", _X86, "x86-64-v4", (WIDE,)),
    Cpu(
        "x86-64-v4-vnni",
        "AVX-512 VNNI: Intel from Cascade Lake on, AMD from Zen 4 on",
        _X86,
        "x86-64-v4",
        ("+avx512vnni", WIDE),
    ),
    Cpu("armv8-a", "any 64-bit ARM: Cortex-A53, A57, A72, A73", _ARM, "generic", ("+neon",)),
    Cpu(
        "armv8.2-a+dotprod",
        "dot products: Cortex-A55, A75 and younger, Neoverse N1",
        _ARM,
        "generic",
        ("+v8.2a", "+neon", "+dotprod"),
    ),
    # Not +v8.6a: Neoverse V1 has i8mm and is ARMv8.4.
    Cpu(
        "armv8.6-a+i8mm",
        "I8MM: Cortex-A510, A710 and younger, Neoverse V1, N2, V2",
        _ARM,
        "generic",
        ("+v8.2a", "+neon", "+dotprod", "+i8mm"),
    ),
)

BOARDS = (
    Cpu("raspberry-pi-3", "BCM2837, 4 Cortex-A53 (also Zero 2 W)", _ARM, "cortex-a53", (), 4, 32, 512, 0, True),
    Cpu("raspberry-pi-4", "BCM2711, 4 Cortex-A72", _ARM, "cortex-a72", (), 4, 32, 1024, 0, True),
    Cpu("raspberry-pi-5", "BCM2712, 4 Cortex-A76", _ARM, "cortex-a76", (), 4, 64, 512, 2048),
    Cpu("imx8mp", "NXP i.MX 8M Plus, 4 Cortex-A53", _ARM, "cortex-a53", (), 4, 32, 512, 0, True),
    Cpu(
        "rk3588",
        "Rockchip RK3588, 4 Cortex-A76 (these caches) and 4 Cortex-A55",
        _ARM,
        "cortex-a76",
        (),
        8,
        64,
        512,
        3072,
    ),
    Cpu("jetson-nano", "Tegra X1, 4 Cortex-A57", _ARM, "cortex-a57", (), 4, 32, 2048, 0, True),
    Cpu(
        "jetson-orin",
        "Orin Nano, NX, AGX: 6 to 12 Cortex-A78AE; L3 of each four",
        _ARM,
        "cortex-a78ae",
        (),
        12,
        64,
        256,
        2048,
    ),
    Cpu("graviton2", "AWS c6g, m6g: Neoverse N1 (also Ampere Altra)", _ARM, "neoverse-n1", (), 64, 64, 1024, 32 * 1024),
    Cpu("graviton3", "AWS c7g, m7g: Neoverse V1", _ARM, "neoverse-v1", (NO_SVE,), 64, 64, 1024, 32 * 1024),
    Cpu("graviton4", "AWS c8g, m8g: Neoverse V2", _ARM, "neoverse-v2", (NO_SVE,), 96, 64, 2048, 36 * 1024),
    Cpu("intel-n100", "Intel N100, 4 Gracemont", _X86, "gracemont", (), 4, 32, 2048, 6 * 1024, True),
    Cpu("cascade-lake", "Intel Xeon: AWS m5n, GCP n2", _X86, "cascadelake", (WIDE,), 24, 32, 1024, 35 * 1024 + 768),
    Cpu("ice-lake", "Intel Xeon: AWS c6i, m6i", _X86, "icelake-server", (WIDE,), 32, 48, 1280, 54 * 1024),
    Cpu(
        "sapphire-rapids", "Intel Xeon: AWS c7i, m7i; GCP c3", _X86, "sapphirerapids", (WIDE,), 48, 48, 2048, 105 * 1024
    ),
    Cpu("milan", "AMD Zen 3: AWS c6a, m6a; L3 of each eight", _X86, "znver3", (), 48, 32, 512, 32 * 1024),
    Cpu("genoa", "AMD Zen 4: AWS c7a, m7a; L3 of each eight", _X86, "znver4", (WIDE,), 96, 32, 1024, 32 * 1024),
    Cpu("turin", "AMD Zen 5: AWS m8a, GCP c4d; L3 of each eight", _X86, "znver5", (WIDE,), 96, 48, 1024, 32 * 1024),
)

_ARCHITECTURES = (
    Gpu("sm_75", "Turing: T4, RTX 20", ("sm_75",)),
    Gpu("sm_80", "Ampere: A100, A30", ("sm_80",)),
    Gpu("sm_86", "Ampere: A10, A40, RTX 30", ("sm_86",)),
    Gpu("sm_87", "Ampere: Jetson Orin", ("sm_87",), "armv8-a"),
    Gpu("sm_89", "Ada: L4, L40, RTX 40", ("sm_89",)),
    Gpu("sm_90", "Hopper: H100, H200", ("sm_90",)),
    Gpu("sm_100", "Blackwell: B200", ("sm_100",)),
)

GPUS = (
    *_ARCHITECTURES,
    Gpu("cuda", "all of these", tuple(gpu.name for gpu in _ARCHITECTURES)),
)


def cpus() -> dict[str, Cpu]:
    """Levels and boards by name."""
    return {cpu.name: cpu for cpu in (*LEVELS, *BOARDS)}


def gpus() -> dict[str, Gpu]:
    """CUDA targets by name."""
    return {gpu.name: gpu for gpu in GPUS}
