import json

from pumice import loader
from pumice.targets import manifest


def test_the_same_manifest_gives_the_same_bytes():
    one = manifest.encode_manifest({"inputs": [], "note": "ä\n", "layers": [{"a": 1, "b": 2}]})
    two = manifest.encode_manifest({"layers": [{"b": 2, "a": 1}], "note": "ä\n", "inputs": []})
    assert one == two
    assert json.loads(one) == {"format": loader.FORMAT, "inputs": [], "note": "ä\n", "layers": [{"a": 1, "b": 2}]}
    assert b"\0" not in one  # it is a string of C too


def test_there_is_one_reader():
    assert manifest.read_manifest is loader.read_manifest
    assert manifest.FORMAT == loader.FORMAT
