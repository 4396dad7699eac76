"""The database of kernel times: what survives, what is refused, whose times are used."""

import os
from dataclasses import replace

import pytest

from pumice.errors import UsageError
from pumice.schedules.measurements import Machine, Measurement, Workload, format_time, open_journal, read_measurements
from pumice.schedules.tiling import DENSE, Form, Tiling
from pumice.targets.target import Target

HERE = Machine("a CPU", "vnni512", 2, "znver5", "1.0")
CONV = Workload("int8, 64x9x64", (0.1, 0.19, 0.34))
SPARSE, WHOLE, ONE = (Form(1), Tiling(8, 16, 64)), (DENSE, Tiling(6, 8, 64)), (DENSE, None)


def write(path, *entries, machine=HERE):
    with open_journal(path, machine) as journal:
        journal.add([Measurement(*entry) for entry in entries])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tuning.jsonl"


def test_what_was_written_is_read(path):
    write(path, (CONV, SPARSE, 140.5), (CONV, WHOLE, 720.0))
    write(path, (Workload("int8, 10x1x16", (1.0,)), ONE, 7.0))
    measured = read_measurements(path, HERE)
    assert measured.machine == HERE
    assert measured.of(CONV) == {SPARSE: 140.5, WHOLE: 720.0}
    assert measured.of(Workload("int8, 10x1x16", (1.0,))) == {ONE: 7.0}
    assert len(path.read_text().splitlines()) == 4  # one of them names the machine


def test_the_last_time_of_a_kernel_counts(path):
    write(path, (CONV, SPARSE, 1.0))
    write(path, (CONV, SPARSE, 2.0))
    assert read_measurements(path, HERE).of(CONV) == {SPARSE: 2.0}


@pytest.mark.parametrize(
    ("left", "alike"),
    [((0.102, 0.19, 0.34), True), ((0.12, 0.19, 0.34), False), ((0.1, 0.19, 0.5), False), ((0.1,), False)],
)
def test_weights_with_nearly_as_many_blocks_are_alike(path, left, alike):
    write(path, (CONV, SPARSE, 1.0))
    assert bool(read_measurements(path, HERE).of(replace(CONV, left=left))) is alike
    assert not read_measurements(path, HERE).of(replace(CONV, text="int8, 64x9x65"))


@pytest.mark.parametrize("cut", [1, 20, 100])
def test_a_line_without_its_end_is_lost_alone(path, cut):
    write(path, (CONV, WHOLE, 720.0), (CONV, SPARSE, 140.5))
    path.write_bytes(path.read_bytes()[:-cut])
    assert read_measurements(path, HERE).of(CONV) == {WHOLE: 720.0}
    write(path, (CONV, SPARSE, 150.0))
    assert read_measurements(path, HERE).of(CONV) == {WHOLE: 720.0, SPARSE: 150.0}


def test_killed_while_naming_the_machine(path):
    write(path, (CONV, WHOLE, 720.0))
    path.write_bytes(path.read_bytes()[:30])
    write(path, (CONV, SPARSE, 1.0))
    assert read_measurements(path, HERE).of(CONV) == {SPARSE: 1.0}


def test_files_are_merged_by_cat(path, tmp_path):
    other = replace(HERE, threads=1)
    write(path, (CONV, WHOLE, 720.0))
    write(tmp_path / "b", (CONV, SPARSE, 9.0), machine=other)
    write(tmp_path / "c", (CONV, SPARSE, 8.0))
    path.write_text(path.read_text() + (tmp_path / "b").read_text() + (tmp_path / "c").read_text())
    assert read_measurements(path, HERE).of(CONV) == {WHOLE: 720.0, SPARSE: 8.0}
    assert read_measurements(path, other).of(CONV) == {SPARSE: 9.0}


def test_another_cpu_serves_where_this_one_has_nothing(path):
    write(path, (CONV, SPARSE, 1.0), machine=replace(HERE, cpu="old"))
    write(path, (CONV, SPARSE, 2.0), machine=replace(HERE, cpu="new", llvm="sapphirerapids"))
    measured = read_measurements(path, HERE)
    assert measured.machine.cpu == "new" and measured.of(CONV) == {SPARSE: 2.0}
    write(path, (CONV, SPARSE, 3.0))
    assert read_measurements(path, HERE).of(CONV) == {SPARSE: 3.0}


@pytest.mark.parametrize("difference", [{"isa": "avx2"}, {"threads": 1}, {"pumice": "2.0"}])
def test_times_of_other_kernels_are_refused(path, difference):
    write(path, (CONV, SPARSE, 1.0), machine=replace(HERE, **difference))
    with pytest.raises(UsageError, match=r"has times of a CPU \(.*\), and none for a CPU \(vnni512, 2 threads"):
        read_measurements(path, HERE)


@pytest.mark.parametrize(
    "content",
    [
        b"not json\n",
        b"no line end",
        b"{}\n",
        b"[]\n",
        b"5\n",
        b'{"machine": 5}\n',
        b"\x80\x00\n",
        b"[" * 100_000 + b"\n",
    ],
)
def test_a_file_that_is_no_database_stays_as_it_is(path, content):
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"tuning\.jsonl: is no tuning database"):
        read_measurements(path, HERE)
    with pytest.raises(UsageError, match="is no tuning database"), open_journal(path, HERE):
        pass
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"shared": 1', '"shared": 3'),
        ("[8, 16, 64]", "[8, 16]"),
        ("[8, 16, 64]", "[0, 16, 64]"),
        ("[8, 16, 64]", "[8, 16, 63]"),
        ("[8, 16, 64]", "[9999, 16, 64]"),
        ("140.5", "NaN"),
        ("140.5", "-1"),
        ("140.5", '"fast"'),
        ('"ns"', '"us"'),
    ],
)
def test_a_damaged_line_is_named(path, old, new):
    write(path, (CONV, SPARSE, 140.5), (CONV, WHOLE, 720.0))
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UsageError, match=r"tuning\.jsonl, line 2: is no measurement"):
        read_measurements(path, HERE)


def test_one_writer_at_a_time(path):
    with open_journal(path, HERE), pytest.raises(UsageError, match="another"), open_journal(path, HERE):
        pass
    write(path, (CONV, SPARSE, 1.0))


def test_a_file_that_is_not_there(path, tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        read_measurements(path, HERE)
    with pytest.raises(UsageError, match="cannot be written"), open_journal(tmp_path, HERE):
        pass
    with pytest.raises(UsageError, match="cannot be written"), open_journal(tmp_path / "no" / "folder", HERE):
        pass


def test_an_empty_database_has_nothing(path):
    path.touch()
    with pytest.raises(UsageError, match="has times of nothing"):
        read_measurements(path, HERE)


def test_the_machine_of_a_target():
    native = Machine.of(Target.parse("native"), 2)
    assert native.cpu and native.threads == 2 and native.llvm and os.linesep not in native.cpu
    named = Machine.of(Target.parse("x86-64-v3"), 2)
    assert (named.cpu, named.isa) == ("x86-64-v3", "avx2")


def test_times_are_readable():
    assert [format_time(ns) for ns in (466.0, 45_600.0, 1_234_000.0)] == ["0.466 us", "45.6 us", "1.23 ms"]
