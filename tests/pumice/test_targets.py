"""``pumice targets`` and the table in docs/targets.md: one and the same."""

import json
from pathlib import Path

from pumice.cli import main
from pumice.commands.targets import HEADINGS, row
from pumice.targets.target import Target

PAGE = Path(__file__).parents[2] / "docs" / "targets.md"


def test_the_documented_table_is_that_of_the_command():
    """To write it anew: print ``bench.tables.markdown([HEADINGS, *map(row, Target.names()[1:])])``."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.read_text().splitlines() if line]
    start = cells.index(list(HEADINGS))
    names = Target.names()[1:]
    assert [tuple(line) for line in cells[start + 2 : start + 2 + len(names)]] == [row(name) for name in names]


def test_every_name_is_listed(capsys):
    assert main(["targets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:] if line][: len(Target.names()) - 1] == Target.names()[1:]
    (board,) = [line for line in lines if line.startswith("raspberry-pi-4 ")]
    assert board.endswith("cortex-a72          4  32 K    1 M shared")


def test_json_has_what_each_needs(capsys):
    assert main(["targets", "--json"]) == 0
    entries = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert list(entries) == Target.names()
    assert entries["native"]["isa"] == Target.parse("native").isa
    assert "i8mm" in entries["graviton3"]["features"] and entries["graviton3"]["l3"] == 32 * 1024
    assert entries["cuda"]["architectures"][-1] == "sm_100"
