import gzip
import struct

import numpy as np
import pytest

pytest.importorskip("PIL")

from packages import ar_of, tar_of
from PIL import Image

from bench.data_pictures import DEVIATION, MEAN, is_photograph, prepare, read_fashion, split


def pixels_of(prepared):
    return prepared.transpose(1, 2, 0) * DEVIATION + MEAN


def test_prepare_lays_a_transparent_picture_on_white():
    prepared = prepare(Image.new("RGBA", (50, 50), (255, 0, 0, 0)))
    assert prepared.shape == (3, 224, 224)
    assert prepared.dtype == np.float32
    np.testing.assert_allclose(pixels_of(prepared), 1, atol=1e-6)


def test_prepare_keeps_the_whole_of_a_wide_picture_in_the_middle():
    pixels = pixels_of(prepare(Image.new("RGB", (224, 112), (0, 0, 255))))
    np.testing.assert_allclose(pixels[112], np.broadcast_to([0, 0, 1], (224, 3)), atol=1e-6)
    np.testing.assert_allclose(pixels[[0, 223]], 1, atol=1e-6)


def test_prepare_reads_grey_pictures():
    np.testing.assert_allclose(pixels_of(prepare(Image.new("L", (10, 10), 51))), 0.2, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("./stamps/animals/frog.png", True),
        ("./stamps/animals/birds/cartoon/tux.png", False),
        ("./stamps/symbols/math/pi.png", False),
        ("./stamps/animals/frog_mirror.png", False),
    ],
)
def test_is_photograph(name, wanted):
    assert is_photograph(name) is wanted


def test_split_uses_every_picture_once():
    pictures = [np.full((3, 2, 2), i, np.float32) for i in range(5)]
    calibrating, tested = split(pictures)
    assert calibrating[:, 0, 0, 0].tolist() == [0, 2, 4]
    assert tested[:, 0, 0, 0].tolist() == [1, 3]


def test_clothes_come_as_the_demo_takes_them(tmp_path):
    """IDX: a big-endian head of the sizes, then bytes."""
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    files = {
        "./usr/share/t10k-images-idx3-ubyte.gz": struct.pack(">iiii", 0x803, *images.shape) + images.tobytes(),
        "./usr/share/t10k-labels-idx1-ubyte.gz": struct.pack(">ii", 0x801, 3) + bytes([7, 0, 9]),
    }
    data = tar_of({name: gzip.compress(content) for name, content in files.items()}, "w:xz")
    (tmp_path / "dataset-fashion-mnist_1_all.deb").write_bytes(ar_of({"data.tar.xz": data}))
    found, labels = read_fashion(tmp_path, "t10k")
    assert found.dtype == np.float32 and labels.tolist() == [7, 0, 9]
    np.testing.assert_array_equal(found, images[:, None] / np.float32(255))
