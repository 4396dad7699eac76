"""Libraries of one model for several machines in one archive (.pum), what they have in common once.

    model-v4.so     | A  B   C  D  |              A  B  C  D  X  Y  bundle.json
    model-arm.so    | X  B   C  Y  |      ->      v4: A B C D, arm: X B C Y

A library is cut into pieces where its content says so: after 64 bytes with one of some hashes. Every array of weights
begins at a multiple of 64, so arrays that two libraries share are cut alike wherever they lie. (Content-defined
chunking, as in Muthitacharoen et al., "A Low-bandwidth Network File System", 2001, but on whole grains.)
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pumice.errors import UsageError
from pumice.files import move_into_place
from pumice.loader import BUNDLE_FORMAT, INDEX, read_manifest

_GRAIN = 64  # bytes: the alignment of weights, of which a piece is a multiple
_PIECE = 512  # grains in a piece, on average
_LEAST, _MOST = _PIECE // 8, _PIECE * 8  # grains: what repeats itself would end everywhere, or nowhere
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the date of every member, since the same libraries give the same archive


@dataclass(frozen=True)
class Written:
    """What a bundle holds: its variants as ``bundle.json`` lists them, and its size in bytes beside theirs."""

    variants: list[dict[str, Any]]
    size: int

    @property
    def size_alone(self) -> int:
        """Bytes of the libraries by themselves."""
        return sum(variant["bytes"] for variant in self.variants)


def write_bundle(libraries: Sequence[str | Path], path: str | Path) -> Written:
    """Write the archive of ``libraries`` to ``path``, complete or not at all; the same ones give the same bytes.

    The loader takes the first variant that the machine can run, so they are put in order: those for a GPU first, then
    by how many CPU features they need, the most first, then as given. Raises ModelError for a file that is no library
    and UsageError where two are not of one model, or need the same, so that the second would never be chosen.
    """
    found = [(Path(library), read_manifest(library)) for library in libraries]
    if not found:
        raise UsageError(f"{path}: a bundle needs at least one library")
    _check_alike(found)
    found.sort(key=lambda entry: _rank(entry[1]["target"]))
    with tempfile.TemporaryDirectory(prefix="pumice-") as folder:
        complete = Path(folder, "bundle.pum")
        with zipfile.ZipFile(complete, "w", zipfile.ZIP_STORED) as archive:
            stored: set[str] = set()
            variants = [_add(archive, stored, library, manifest) for library, manifest in found]
            index = {"format": BUNDLE_FORMAT, "variants": variants}
            archive.writestr(_member(INDEX), json.dumps(index, sort_keys=True, separators=(",", ":")))
        move_into_place(complete, Path(path))
        return Written(variants, complete.stat().st_size)


def cut(content: bytes) -> Iterator[bytes]:
    """The pieces of ``content``, in order."""
    start = 0
    for end in _ends(content):
        yield content[start:end]
        start = end


def _ends(content: bytes) -> list[int]:
    """Where pieces end."""
    whole = len(content) // _GRAIN
    ends, start = [], 0
    for end in [*_boundaries(content, whole), whole]:
        while end - start > _MOST:
            start += _MOST
            ends.append(start * _GRAIN)
        if end - start >= _LEAST:
            start = end
            ends.append(start * _GRAIN)
    return ends if ends and ends[-1] == len(content) else [*ends, len(content)]


def _boundaries(content: bytes, grains: int) -> list[int]:
    """After which grains a piece may end: those of which a hash, the sum of their words times odd numbers, says so."""
    words = np.frombuffer(content, "<u8", grains * _GRAIN // 8).reshape(grains, _GRAIN // 8)
    factors = np.random.default_rng(0).integers(2**63, size=words.shape[1], dtype=np.uint64) * 2 + 1
    high_bits = (words @ factors) >> np.uint64(40)
    return (np.flatnonzero(high_bits % _PIECE == 1) + 1).tolist()  # zeros, which there may be many of, are no end


def _rank(target: dict[str, Any]) -> tuple[bool, int]:
    return target["isa"] != "cuda", -len(target["features"])


def _check_alike(found: Sequence[tuple[Path, dict[str, Any]]]) -> None:
    first, model = found[0]
    seen: dict[tuple[Any, ...], Path] = {}
    for path, manifest in found:
        for what, own, others in (
            ("sources", manifest["source"]["sha256"], model["source"]["sha256"]),
            *((key, manifest[key], model[key]) for key in ("inputs", "outputs")),
        ):
            if own != others:
                raise UsageError(f"{path}: is not of the same model as {first}: their {what} differ")
        target = manifest["target"]
        needs = (target["architecture"], target["isa"] == "cuda", *sorted(target["features"]))
        if needs in seen:
            raise UsageError(f"{path}: needs the same CPU as {seen[needs]}, so it would never be chosen; leave one out")
        seen[needs] = path


def _add(archive: zipfile.ZipFile, stored: set[str], path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Store the pieces that are not there yet; the entry of ``bundle.json``."""
    content, pieces = path.read_bytes(), []
    for piece in cut(content):
        name = hashlib.sha256(piece).hexdigest()
        pieces.append(name)
        if name not in stored:
            archive.writestr(_member(name), piece)
            stored.add(name)
    return {
        "name": path.name,
        "target": {key: manifest["target"][key] for key in ("name", "architecture", "features", "isa")},
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "pieces": pieces,
    }


def _member(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(name, _EPOCH)
