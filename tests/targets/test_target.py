import pytest
from tvm.target.codegen import llvm_is_valid_cpu

from pumice.errors import UnsupportedError
from pumice.targets import detect
from pumice.targets.boards import LEVELS, cpus
from pumice.targets.detect import host_features, parse_cpuinfo
from pumice.targets.target import Target, native_target

AVX512 = {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}
V3 = {"pni", "ssse3", "sse4_1", "sse4_2", "popcnt", "abm", "movbe", "bmi1", "bmi2", "avx", "f16c", "fma", "avx2"}


@pytest.mark.parametrize(
    ("name", "isa", "needs"),
    [
        ("x86-64", "portable", set()),
        ("x86-64-v3", "avx2", {"avx2", "fma"}),
        ("x86-64-v3-avxvnni", "avxvnni", {"avx2", "avx_vnni"}),
        ("x86-64-v4", "avx512bw", AVX512),
        ("x86-64-v4-vnni", "vnni512", AVX512 | {"avx512_vnni"}),
        ("armv8-a", "neon", {"asimd"}),
        ("armv8.2-a+dotprod", "dotprod", {"asimd", "asimddp"}),
        ("armv8.6-a+i8mm", "i8mm", {"asimd", "asimddp", "i8mm"}),
        ("raspberry-pi-4", "neon", {"asimd"}),
        ("raspberry-pi-5", "dotprod", {"asimddp"}),
        ("jetson-orin", "dotprod", {"asimddp"}),
        ("graviton3", "i8mm", {"asimddp", "i8mm"}),
        ("intel-n100", "avxvnni", {"avx2", "avx_vnni"}),
        ("sapphire-rapids", "vnni512", AVX512 | {"avx512_vnni"}),
        ('{"kind": "llvm", "mcpu": "skylake-avx512"}', "avx512bw", AVX512),
        ('{"kind": "llvm", "mcpu": "cascadelake"}', "vnni512", AVX512 | {"avx512_vnni"}),
        ('{"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a76"}', "dotprod", {"asimddp"}),
    ],
)
def test_names_say_what_the_cpu_must_have(name, isa, needs):
    target = Target.parse(name)
    assert target.name == name
    assert target.isa == isa
    assert needs <= target.features
    assert target.triple.startswith(target.architecture)


def test_a_level_needs_nothing_of_the_next():
    assert "avx512f" not in Target.parse("x86-64-v3").features
    assert "avx512_vnni" not in Target.parse("x86-64-v4").features
    assert not {"asimddp", "i8mm"} & Target.parse("armv8-a").features
    assert "i8mm" not in Target.parse("armv8.2-a+dotprod").features


@pytest.mark.parametrize("name", cpus())
def test_a_board_runs_what_is_compiled_for_its_level(name):
    """Of the levels that a board's features meet, the one with the best kernels has the board's kernels."""
    board = Target.parse(name)
    levels = [Target.parse(level.name) for level in LEVELS if level.architecture == board.architecture]
    assert board.isa in [level.isa for level in levels if level.features <= board.features]
    assert not {"sve", "sve2"} & board.features
    assert llvm_is_valid_cpu(cpus()[name].model, board.triple)


def test_levels_need_no_more_than_younger_boards_have():
    """Neoverse V1 is ARMv8.4 and has the product of ARMv8.6."""
    for level, board in (
        ("armv8.6-a+i8mm", "graviton3"),
        ("armv8.6-a+i8mm", "graviton4"),
        ("armv8.2-a+dotprod", "rk3588"),
        ("x86-64-v4-vnni", "cascade-lake"),
        ("x86-64-v4-vnni", "genoa"),
        ("x86-64-v3-avxvnni", "intel-n100"),
    ):
        assert Target.parse(level).features <= Target.parse(board).features


@pytest.mark.parametrize(
    ("text", "architectures", "host"),
    [
        ("sm_75", ["sm_75"], "x86_64"),
        ("sm_87", ["sm_87"], "aarch64"),
        ("sm_90@armv8-a", ["sm_90"], "aarch64"),
        ("cuda", ["sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100"], "x86_64"),
    ],
)
def test_gpus_have_a_cpu_beside_them(text, architectures, host):
    target = Target.parse(text)
    assert (target.name, target.kind, target.isa) == (text, "cuda", "cuda")
    assert list(target.gpus) == architectures
    assert target.architecture == host
    assert target.features <= {"asimd"}
    assert Target.parse("native").kind == "cpu" and not Target.parse("native").gpus


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sm_70", "sm_90"),
        ("rasberry-pi-5", "(like yours: raspberry-pi-5, "),
        ("x86-64-v4-vnn", "x86-64-v4-vnni"),
        ("sm_90@", "not known"),
        ("sm_90@sm_90", "not known"),
        ('{"kind": "cuda", "arch": "sm_90"}', "kind 'cuda'"),
        ("pentium", "`pumice targets`"),
        ("", "JSON"),
        ('{"kind"', "not known"),
        ("llvm -mcpu=znver4", "JSON"),
        ('{"kind": "llvm", "mcpu": "bogus"}', "no x86_64 CPU called 'bogus'"),
        ('{"kind": "llvm", "mtriple": "riscv64-linux-gnu"}', "riscv64"),
    ],
)
def test_others_are_refused_with_a_sentence(text, says):
    with pytest.raises(UnsupportedError) as caught:
        Target.parse(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "isa"),
    [
        (V3 | AVX512 | {"avx512_vnni"}, "vnni512"),
        (V3 | AVX512, "avx512bw"),
        (V3 | {"avx_vnni"}, "avxvnni"),
        (V3, "avx2"),
        ({"pni", "ssse3"}, "portable"),
        (set(), "portable"),
    ],
)
def test_native_uses_what_the_flags_list_and_no_more(flags, isa):
    target = native_target("x86_64", frozenset(flags))
    assert target.isa == isa
    assert target.features <= flags


def test_native_runs_on_this_machine():
    assert Target.parse("native").features <= host_features()


def test_native_of_an_unknown_machine_is_refused():
    with pytest.raises(UnsupportedError, match="s390x"):
        native_target("s390x", frozenset())


def test_cores_that_differ_count_for_what_they_share():
    text = "processor: 0\nFeatures\t: asimd asimddp sve\nprocessor: 1\nFeatures\t: asimd asimddp\n"
    assert parse_cpuinfo(text) == {"asimd", "asimddp"}
    assert parse_cpuinfo("model name : a CPU\n") == frozenset()


def test_without_cpuinfo_llvm_says(monkeypatch, tmp_path):
    monkeypatch.setattr(detect, "_CPUINFO", tmp_path / "none")
    host_features.cache_clear()
    try:
        assert isinstance(host_features(), frozenset)
    finally:
        host_features.cache_clear()
