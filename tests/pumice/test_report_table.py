import pytest
from hypothesis import given
from hypothesis import strategies as st

from pumice.record import LayerRecord
from pumice.report_table import _columns, clean, format_bytes, format_layers, shorten


def layer(name, **more):
    defaults = {"macs": 1000, "source_bytes": 400, "compiled_bytes": 100, "kernel": "sparse 1x4 vnni512 8x1"}
    return LayerRecord(name, "conv2d", f"{name}.weight", (16, 4, 3, 3), **{**defaults, **more})


def test_the_table_holds_what_was_decided():
    text = format_layers(
        [
            layer("conv1", dtype="int8", sparsity=0.9, snr_db=38.25, reason="sparse is faster"),
            layer("conv2", reason="kept by pattern", kernel="dense", notes=["a note"]),
            layer("conv3", reason="sparse is faster"),
        ],
        120,
    )
    lines = text.splitlines()
    assert all(word in lines[2] for word in ("conv1", "16x4x3x3", "90.0 %", "int8", "sparse 1x4", "38.2", "[1]"))
    assert "[2][3]" in lines[3]
    assert lines[4].endswith("[1]")
    assert text.count("sparse is faster") == 1
    assert "400 B -> 100 B" in lines[2]
    assert "3 layers, 1 int8, 2 sparse, weights 1.2 kB -> 300 B, 3,000 multiply-adds, 70.0 %" in text


def test_before_compilation_the_columns_of_compilation_are_left_out():
    text = format_layers([layer("conv1", kernel="", compiled_bytes=0)], 120)
    assert not any(word in text for word in ("kernel", "SNR", "->", "why"))


def test_a_long_name_keeps_its_ends_and_the_line_its_width():
    text = format_layers([layer("encoder." * 1000 + "query")], 120)
    assert max(map(len, text.splitlines()[:3])) <= 120
    assert "encoder" in text.splitlines()[2]
    assert "query" in text.splitlines()[2]


def test_names_cannot_drive_the_terminal():
    text = format_layers([layer("\x1b[31mred\n\u202eevil%s", reason="\x07")], 120)
    assert not any(c in text for c in "\x1b\u202e\x07")
    assert "\\x1b[31mred\\n\\u202eevil%s" in text


@given(st.text(), st.integers(3, 30))
def test_shortening_fits(text, width):
    assert _columns(shorten(clean(text), width)) <= width
    assert clean(text).isprintable()


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (25_600_000, "25.6 MB"), (3e9, "3.00 GB")]
)
def test_bytes_are_readable(count, text):
    assert format_bytes(count) == text


def test_no_layers_is_said():
    assert "no convolution" in format_layers([], 120)
