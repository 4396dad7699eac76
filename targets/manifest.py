"""The manifest of a compiled library: what it holds, in an ELF section that is read without loading the library.

``.pumice.manifest`` holds one JSON object. ``pumice.loader`` reads it from the section headers in plain Python, so that
a library for another machine can be inspected, and one that this CPU cannot run is refused before any of its code is
mapped.
"""

from __future__ import annotations

import json
from typing import Any

from pumice.loader import FORMAT, SECTION, read_manifest

__all__ = ["FORMAT", "SECTION", "encode_manifest", "read_manifest"]


def encode_manifest(manifest: dict[str, Any]) -> bytes:
    """The section's bytes: the same for the same manifest."""
    return json.dumps({"format": FORMAT, **manifest}, sort_keys=True, separators=(",", ":")).encode()
