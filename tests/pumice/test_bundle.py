"""Archives of variants: what goes in comes out, the best is chosen, and a bad archive is refused with a sentence."""

import hashlib
import json
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_onnx

import pumice
from pumice import loader
from pumice.bundle import cut, write_bundle
from pumice.cli import main
from pumice.errors import MissingDependencyError, ModelError, PumiceError, UnsupportedError, UsageError
from pumice.loader import INDEX, Bundle

SHAPE = (1, 1, 8, 8)
QUICK = {"check": False, "equalize": False, "correct_bias": False, "measure_errors": False}
TARGETS = ("x86-64", "x86-64-v3", "x86-64-v4", "armv8-a")


@pytest.fixture(scope="module")
def variants(tmp_path_factory, model_path, samples):
    """A library for each target, by the target's name; without checks, which would need twins."""
    folder = tmp_path_factory.mktemp("variants")
    for target in TARGETS:
        data = {"inputs": {"image": SHAPE}, "calibration": {"image": samples}}
        pumice.compile(model_path, target=target, **data, **QUICK).save(folder / f"{target}.so")
    return {target: folder / f"{target}.so" for target in TARGETS}


@pytest.fixture(scope="module")
def bundle(variants, tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "model.pum"
    write_bundle([variants[target] for target in TARGETS], path)
    return path


@pytest.fixture
def cpu(monkeypatch):
    """Pretend that this machine is another."""

    def cpu(architecture, features):
        monkeypatch.setattr(loader, "host_architecture", lambda: architecture)
        monkeypatch.setattr(loader, "host_features", lambda: frozenset(features))

    return cpu


def features_of(path):
    return set(loader.read_manifest(path)["target"]["features"])


def test_every_library_comes_out_as_it_went_in(bundle, variants, tmp_path):
    archive = Bundle(bundle)
    assert [variant.name for variant in archive.variants] == ["x86-64-v4.so", "x86-64-v3.so", "armv8-a.so", "x86-64.so"]
    for variant in archive.variants:
        with (tmp_path / "out.so").open("wb") as file:
            archive.extract(variant, file)
        assert (tmp_path / "out.so").read_bytes() == variants[variant.name.removesuffix(".so")].read_bytes()


def test_the_best_that_the_cpu_can_run_is_chosen(bundle, variants, cpu, samples):
    expected = pumice.load(variants["x86-64"])(samples[:1])["logits"]
    own = loader.host_features()
    for target in ("x86-64-v4", "x86-64-v3", "x86-64"):
        if not features_of(variants[target]) <= own:
            continue
        cpu("x86_64", {"fpu", *features_of(variants[target])})
        model = pumice.load(bundle, threads=1)
        assert model.manifest["target"]["name"] == target
        np.testing.assert_array_equal(model(samples[:1])["logits"], expected)


def test_a_variant_without_its_device_is_passed_over(bundle, variants, cpu, monkeypatch):
    cpu("x86_64", {"fpu", *features_of(variants["x86-64-v3"])})
    opened = []

    class Model(loader.Model):
        def __init__(self, library, threads):
            opened.append(library.name)
            if len(opened) == 1:
                raise MissingDependencyError("no GPU")
            super().__init__(library, threads)

    monkeypatch.setattr(loader, "Model", Model)
    assert loader.load(bundle).manifest["target"]["name"] == "x86-64"
    assert [name.rpartition("(")[2] for name in opened] == ["x86-64-v3.so)", "x86-64.so)"]


def test_without_a_list_of_features_the_library_itself_decides(bundle, cpu):
    cpu("x86_64", ())
    assert pumice.load(bundle).manifest["target"]["name"].startswith("x86-64")


def test_a_machine_that_can_run_none_is_told_why(bundle, cpu):
    cpu("sparc9", ())
    with pytest.raises(UnsupportedError, match=r"none of its variants.*x86-64-v4\.so: was compiled for x86_64.*sparc9"):
        pumice.load(bundle)


def test_nothing_is_left_behind(bundle, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = loader.load(bundle)
    assert not list(tmp_path.iterdir())
    model(np.zeros(SHAPE, np.float32))


def test_the_same_libraries_give_the_same_archive(bundle, variants, tmp_path):
    write_bundle(list(variants.values()), tmp_path / "again.pum")
    assert (tmp_path / "again.pum").read_bytes() == bundle.read_bytes()


def test_equal_weights_are_there_once(tmp_path):
    big = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8).tobytes()
    one, two = big, bytes(64 * 7) + big[: 1 << 19] + bytes(64) + big[1 << 19 :] + b"end"
    pieces = [{hashlib.sha256(piece).digest(): len(piece) for piece in cut(content)} for content in (one, two)]
    assert sum((pieces[0] | pieces[1]).values()) < 1.2 * len(big)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from([bytes(64), b"\xff" * 64, bytes(range(64)), b"odd"]), max_size=40), st.integers(1, 5000)
)
def test_pieces_make_the_whole_and_have_a_size(parts, times):
    content = b"".join(parts) * times
    pieces = list(cut(content))
    assert b"".join(pieces) == content
    assert all(len(piece) <= 1 << 19 for piece in pieces)
    assert all(len(piece) >= 4096 for piece in pieces[:-2])


def test_libraries_of_two_models_or_for_one_cpu_are_refused(variants, tmp_path):
    other = tmp_path / "other.so"
    pumice.compile(tiny_onnx(batch=1, logits="other"), quantize=False, target="x86-64", check=False).save(other)
    with pytest.raises(UsageError, match=r"other\.so: is not of the same model as .*v3\.so"):
        write_bundle([variants["x86-64-v3"], other], tmp_path / "model.pum")
    with pytest.raises(UsageError, match="would never be chosen"):
        write_bundle([variants["x86-64"], variants["x86-64-v3"], variants["x86-64"]], tmp_path / "model.pum")
    assert list(tmp_path.iterdir()) == [other]


# Archives that nobody wrote with `pumice bundle`


def rewritten(bundle, path, change):
    """The archive written again with members changed by ``change``: a list of names and contents."""
    with zipfile.ZipFile(bundle) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in change(members):
            archive.writestr(name, content)
    return path


def indexed(change):
    """Change ``bundle.json``."""

    def apply(members):
        index = json.loads(members[-1][1])
        return [*members[:-1], (INDEX, json.dumps(change(index) or index))]

    return apply


def huge(index):
    for variant in index["variants"]:
        variant["pieces"] *= 1 << 13
        variant["bytes"] <<= 13


CHANGES = {
    "no index": lambda members: members[:-1],
    "an index of nonsense": lambda members: [*members[:-1], (INDEX, b"\xff{")],
    "deep nesting": lambda members: [*members[:-1], (INDEX, b"[" * 100_000)],
    "an index that is a list": lambda members: [*members[:-1], (INDEX, b"[]")],
    "a missing piece": lambda members: members[1:],
    "pieces of others": lambda members: [(members[0][0], members[1][1]), *members[1:]],
    "a path that leads out": lambda members: [("../../etc/passwd", b"x"), *members],
    "an absolute path": lambda members: [("/tmp/x", b"x"), *members],
    "a folder": lambda members: [("pieces/", b""), *members],
    "another format": indexed(lambda index: {**index, "format": 2}),
    "another hash": indexed(lambda index: index["variants"][0].update(sha256="0" * 64)),
    "another length": indexed(lambda index: index["variants"][0].update(bytes=1)),
    "a bomb": indexed(huge),
    "a target without features": indexed(lambda index: index["variants"][0].update(target=5)),
    "features that are numbers": indexed(lambda index: index["variants"][0]["target"].update(features=7)),
    "no variants": indexed(lambda index: index.update(variants=[])),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_no_bundle_is_refused(bundle, tmp_path, change, cpu):
    first = Bundle(bundle).variants[0].target
    cpu("x86_64", first["features"])
    path = rewritten(bundle, tmp_path / "bad.pum", change)
    with pytest.raises(PumiceError) as caught:
        loader.load(path)
    assert caught.value.exit_code in (3, 4)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_that_are_there_twice_or_compressed_are_refused(bundle, tmp_path):
    path = rewritten(bundle, tmp_path / "twice.pum", lambda members: [members[0], *members])
    with pytest.raises(ModelError, match="twice"):
        Bundle(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0" * 64, bytes(1 << 20))
        archive.writestr(INDEX, "{}")
    with pytest.raises(ModelError, match="compressed"):
        Bundle(path)


def test_a_member_that_claims_more_than_there_is(bundle, tmp_path):
    content = bytearray(bundle.read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 20 : entry + 28] = struct.pack("<II", 1 << 31, 1 << 31)  # both sizes of the first member
    path = tmp_path / "bad.pum"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="larger than the file"):
        Bundle(path)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_an_archive_that_is_cut_off_or_damaged_is_refused_or_whole(bundle, tmp_path_factory, data):
    content = bytearray(bundle.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.mktemp("damaged") / "model.pum"
    path.write_bytes(content)
    try:
        archive = Bundle(path)
        for variant in archive.variants:
            with tempfile.TemporaryFile() as file:
                archive.extract(variant, file)
                file.seek(0)
                assert hashlib.sha256(file.read()).hexdigest() == variant.sha256
    except ModelError as error:
        assert str(path) in str(error)


def test_a_full_disk_says_where_to_unpack(bundle, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def fail(self, variant, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Bundle, "extract", fail)
    with pytest.raises(UsageError, match=r"No space left on device; set TMPDIR"):
        loader.load(bundle)


# The command


def test_the_command(variants, tmp_path, capsys, samples):
    path = tmp_path / "model.pum"
    libraries = [str(variants[target]) for target in TARGETS]
    assert main(["bundle", *libraries, "-o", str(path)]) == 0
    shown = capsys.readouterr().out
    assert shown.index("x86-64-v4.so") < shown.index("x86-64.so")
    assert "by themselves" in shown
    assert main(["inspect", str(path)]) == 0
    assert "x86-64-v4.so" in capsys.readouterr().out
    assert main(["inspect", str(path), "--json"]) == 0
    assert [entry["target"]["name"] for entry in json.loads(capsys.readouterr().out)["variants"]][-1] == "x86-64"
    np.savez(tmp_path / "in.npz", image=samples[:1])
    assert main(["run", str(path), "-i", str(tmp_path / "in.npz")]) == 0
    assert main(["bundle", *libraries, "-o", libraries[0]]) == 2
    assert main(["bundle", *libraries, libraries[0], "-o", str(path)]) == 2
    assert main(["bundle", str(tmp_path / "none.so"), "-o", str(path)]) == 3
    capsys.readouterr()
    script = Path(loader.__file__)
    done = subprocess.run([sys.executable, "-I", script, path, "describe"], capture_output=True, text=True, check=True)
    assert "x86-64-v3.so: x86-64-v3 (x86_64 with " in done.stdout
