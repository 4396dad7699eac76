import pytest

from bench.machine import cache_sizes, working_sets


@pytest.fixture
def caches(tmp_path):
    for index, (level, kind, size) in enumerate(
        [(1, "Data", "48K"), (1, "Instruction", "32K"), (2, "Unified", "1024K"), (3, "Unified", "32M")]
    ):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, value in {"level": level, "type": kind, "size": size}.items():
            (folder / name).write_text(f"{value}\n")
    return tmp_path


def test_data_caches_in_bytes(caches):
    assert cache_sizes(caches) == {"L1": 48 << 10, "L2": 1 << 20, "L3": 32 << 20}


def test_where_the_system_does_not_say(tmp_path):
    assert set(cache_sizes(tmp_path)) == {"L1", "L2", "L3"}


def test_working_sets_lie_in_their_level_in_whole_strips(caches):
    sets = working_sets(cache_sizes(caches))
    assert sets["L1"] == 24 << 10
    assert sets["memory"] == 128 << 20
    assert all(size % 1024 == 0 for size in sets.values())
    assert working_sets({"L1": 48 << 10, "L3": 1 << 30})["memory"] == 256 << 20
