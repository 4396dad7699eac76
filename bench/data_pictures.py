"""Real pictures for classifiers: photographs among Tux Paint's stamps, as ImageNet networks take them, and clothes."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from bench.data_packages import find_package, read_deb
from pumice.demo.run import to_input

Pictures = npt.NDArray[np.float32]

SIDE = 224
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)
_NO_PHOTOGRAPHS = ("/symbols/", "/cartoon/")
_COPIES = ("_mirror.png", "_flip.png")


def read_pictures(folder: Path) -> dict[str, Pictures]:
    """All photographs of the Debian package ``tuxpaint-stamps-default`` in ``folder``, by name, in name order.

    Drawn symbols, cartoons and mirrored copies are left out. Each picture is ``[3, 224, 224]``, normalised.
    """
    package = find_package(folder, "tuxpaint-stamps-default_*.deb")
    encoded = {name: data for name, data in read_deb(package, ".png") if is_photograph(name)}
    return {name: prepare(Image.open(io.BytesIO(encoded[name]))) for name in sorted(encoded)}


def read_fashion(folder: Path, kind: str) -> tuple[Pictures, npt.NDArray[np.uint8]]:
    """Images ``[n, 1, 28, 28]`` in 0..1 and labels of Fashion-MNIST, ``train`` or ``t10k``, in its order.

    From the Debian package ``dataset-fashion-mnist`` in ``folder``; files in the IDX format.
    """
    package = find_package(folder, "dataset-fashion-mnist_*.deb")
    found = {name.rsplit("/", 1)[-1]: gzip.decompress(data) for name, data in read_deb(package, "-ubyte.gz")}
    images = np.frombuffer(found[f"{kind}-images-idx3-ubyte.gz"], np.uint8, offset=16)
    labels = np.frombuffer(found[f"{kind}-labels-idx1-ubyte.gz"], np.uint8, offset=8)
    return to_input(images.reshape(-1, 28, 28)), labels


def is_photograph(name: str) -> bool:
    """Whether a stamp is worth showing to a network that was trained on photographs."""
    return not any(part in name for part in _NO_PHOTOGRAPHS) and not name.endswith(_COPIES)


def prepare(image: Image.Image) -> Pictures:
    """Lay the picture on a white square, scale it to 224 x 224, normalise: ``[3, 224, 224]``.

    A stamp is cut out along its object, so the usual centre crop would cut into the object.
    """
    picture = image.convert("RGBA")
    longest = max(picture.size)
    square = Image.new("RGBA", (longest, longest), "white")
    square.alpha_composite(picture, ((longest - picture.width) // 2, (longest - picture.height) // 2))
    scaled = square.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    pixels = np.asarray(scaled, np.float32) / np.float32(255)
    return np.ascontiguousarray(((pixels - MEAN) / DEVIATION).transpose(2, 0, 1))


def split(pictures: Iterable[Pictures]) -> tuple[Pictures, Pictures]:
    """Every second picture to calibrate, the others to test: two arrays ``[n, 3, 224, 224]``."""
    stacked = np.stack(list(pictures))
    return stacked[0::2].copy(), stacked[1::2].copy()
