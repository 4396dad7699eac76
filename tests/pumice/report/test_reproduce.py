import shlex
from dataclasses import replace

import pytest

from pumice import cli
from pumice.report.reproduce import compile_command


def test_the_command_makes_the_same_library_again(bare, library, model_path, calibration_path, tmp_path, capsys):
    words = shlex.split(compile_command(bare))
    files = {"tiny.onnx": model_path, "CALIBRATION.npz": calibration_path, "tiny.so": tmp_path / "again.so"}
    assert cli.main([str(files.get(word, word)) for word in words[1:]]) == 0
    assert (tmp_path / "again.so").read_bytes() == library.read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recipe": {"quantize": False}}, "--no-quantize"),
        ({"recipe": {"prune": ["filters:0.3", "magnitude:2:4"]}}, "--prune filters:0.3 --prune magnitude:2:4"),
        ({"recipe": {"keep_float": ["a*", "b c"]}}, "--keep-float 'a*' --keep-float 'b c'"),
        ({"threads": 2}, "--threads 2"),
        ({"libc": "musl"}, "--musl"),
        ({"libc": "glibc-2.28"}, "--glibc 2.28"),
        (
            {"recipe": {"calibration_method": "mse", "smooth": "search", "permute": True}},
            "--permute --smooth search --calibration-method mse",
        ),
        ({"recipe": {"equalize": False}, "check": False}, "--no-equalize --no-check"),
        ({"tuning_db": "times.jsonl"}, "--tuning-db times.jsonl"),
    ],
)
def test_options_come_back(bare, options, words):
    recipe = {**bare.manifest["options"]["recipe"], **options.get("recipe", {})}
    manifest = {**bare.manifest, "options": {**bare.manifest["options"], **options, "recipe": recipe}}
    command = compile_command(replace(bare, manifest=manifest))
    assert words in command
    assert ("--calibration " in command) == recipe["quantize"]
    cli._parser().parse_args(shlex.split(command)[1:])


def test_masks_of_a_side_file_come_back(bare):
    layers = [{**entry, "pruned_by": "side file masks.npz"} for entry in bare.manifest["layers"]]
    assert compile_command(replace(bare, manifest={**bare.manifest, "layers": layers})).count("--masks masks.npz") == 1


def test_masks_and_pruning_behind_them_come_back(bare):
    by = ["side file masks.npz", "side file masks.npz, then magnitude:1x4:0.5", "magnitude:1x4:0.5"]
    layers = [{**entry, "pruned_by": text} for entry, text in zip(bare.manifest["layers"], by, strict=True)]
    command = compile_command(replace(bare, manifest={**bare.manifest, "layers": layers}))
    assert command.count("--masks masks.npz") == command.count("--masks") == 1
    assert "then" not in command
