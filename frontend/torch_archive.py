"""Saved ``.pt2`` programs, read without letting anything in the file run.

``torch.export.load`` trusts its file: it unpickles tensors marked ``use_pickle``, custom objects and, when the safe
way fails, the example inputs; it loads compiled libraries; it hands the text of symbolic sizes to an evaluator,
names of operators to getattr and names of nodes to a code generator; it imports modules that a tree's description
names. So the archive is taken apart here with zipfile and json alone, every part that torch would act upon is held
against a list of harmless forms, and torch is given a new archive made of what passed.
"""

from __future__ import annotations

import io
import json
import logging
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.export.pt2_archive import PT2ArchiveWriter
from torch.utils._pytree import tree_unflatten

from pumice.errors import ModelError, UnsupportedError
from pumice.frontend.torch_operators import first_line

_MAX_JSON = 256 << 20
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_MODULE_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*\Z")
_OPERATOR = re.compile(
    r"torch\.ops\.aten\.[A-Za-z0-9_]+\.[A-Za-z0-9_]+\Z"
    r"|_operator\.(getitem|add|sub|mul|floordiv|mod|neg|eq|ne|lt|le|gt|ge|truediv|pow|and_|or_)\Z"
    r"|math\.(ceil|floor|trunc)\Z|torch\.sym_(int|float|max|min|not|ite|sqrt)\Z"
    r"|torch\.ops\.higher_order\.wrap_with_set_grad_enabled\Z"
)
_TREE_TYPES = {None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}
# The functions in the printed form of a symbolic size.
_SYMBOLIC_WORDS = {
    *("Integer", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Mod", "PythonMod", "FloorDiv", "CeilDiv", "CleanDiv"),
    *("ModularIndexing", "IntTrueDiv", "PowByNatural", "TruncToInt", "CeilToInt", "FloorToInt", "Eq", "Ne", "Le", "Lt"),
    *("Ge", "Gt", "StrictLessThan", "LessThan", "GreaterThan", "StrictGreaterThan", "Equality", "Unequality", "Not"),
    *("And", "Or", "true", "false", "oo", "int_oo", "Identity"),
}


def load_program(path: Path) -> ExportedProgram:
    """The program that ``torch.export.save`` wrote to ``path``.

    Raises ModelError for a file that is no such archive, is damaged, or holds what torch would execute, and
    UnsupportedError for a program with operators from outside torch.
    """
    source = path.name
    records = _read_records(path, source)
    clean = _clean_archive(records, source)
    logger = logging.getLogger("torch.export")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)  # what it would say of a damaged file, the exception says too
        return _with_placeholder_examples(torch.export.load(io.BytesIO(clean)))
    except Exception as error:
        raise ModelError(
            f"{source}: torch {torch.__version__} cannot read this program: {first_line(error)}; export it again with"
            " torch.export.save of the same version"
        ) from error
    finally:
        logger.setLevel(level)


def _with_placeholder_examples(program: ExportedProgram) -> ExportedProgram:
    """``program`` with example inputs of the right structure: torch binds them to forward()'s arguments.

    Only their number and nesting count. Those in the file are a pickle, and were left out.
    """
    given = (spec for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT)
    flat = [getattr(spec.arg, "value", torch.empty(0)) for spec in given]
    program._example_inputs = tree_unflatten(flat, program.call_spec.in_spec)
    return program


def _read_records(path: Path, source: str) -> dict[str, bytes]:
    """The archive's members by their path under its root folder."""
    if not path.is_file():
        raise ModelError(f"{source}: {'is a folder' if path.is_dir() else 'does not exist'}; a .pt2 file is needed")
    if path.stat().st_size == 0:
        raise ModelError(f"{source}: the file is empty")
    records: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                    raise ModelError(
                        f"{source}: '{member.filename}' is compressed or encrypted, which .pt2 files never are"
                    )
                name = member.filename.partition("/")[2]
                if name in records:
                    raise ModelError(f"{source}: '{member.filename}' is there twice")
                if member.file_size > path.stat().st_size:
                    raise ModelError(f"{source}: '{member.filename}' claims more bytes than the file has")
                records[name] = archive.read(member)
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ModelError(
            f"{source}: is not a whole .pt2 archive ({first_line(error)}); write it with torch.export.save"
        ) from error
    if records.get("archive_format") != b"pt2" or "models/model.json" not in records:
        raise ModelError(f"{source}: holds no exported program named 'model'; write it with torch.export.save")
    return records


def _clean_archive(records: dict[str, bytes], source: str) -> bytes:
    """A new archive of the parts that were checked, with no example inputs: those are a pickle."""
    if any(name.startswith("data/aotinductor/") for name in records):
        raise UnsupportedError(f"{source}: holds compiled code (AOTInductor), not only a program; export it without")
    program = _json(records["models/model.json"], "models/model.json", source)
    _check_program(program, source)
    kept = {
        "archive_format": b"pt2",
        "archive_version": records.get("archive_version", b"0"),
        "byteorder": b"little",
        "models/model.json": records["models/model.json"],
    }
    if records.get("byteorder", b"little") != b"little":
        raise UnsupportedError(f"{source}: was written on a big-endian machine")
    for kind in ("weights", "constants"):
        config_name = f"data/{kind}/model_{kind}_config.json"
        if config_name not in records:
            raise ModelError(f"{source}: '{config_name}' is missing; export the program again with torch 2.9 or later")
        config = _json(records[config_name], config_name, source)
        for file in _payload_files(config, kind, source):
            if f"data/{kind}/{file}" not in records:
                raise ModelError(f"{source}: 'data/{kind}/{file}' is missing")
            kept[f"data/{kind}/{file}"] = records[f"data/{kind}/{file}"]
        kept[config_name] = records[config_name]
    examples = io.BytesIO()
    torch.save(((), {}), examples)
    kept["data/sample_inputs/model.pt"] = examples.getvalue()
    buffer = io.BytesIO()
    with PT2ArchiveWriter(buffer) as writer:
        for name, data in kept.items():
            if name != "byteorder":  # the writer's own
                writer.write_bytes(name, data)
    return buffer.getvalue()


def _payload_files(config: Any, kind: str, source: str) -> Iterator[str]:
    """The files of raw tensor bytes that a configuration names."""
    entries = config.get("config") if isinstance(config, dict) else None
    if not isinstance(entries, dict):
        raise ModelError(f"{source}: the table of its {kind} is damaged")
    prefix = {"weights": "weight_", "constants": "tensor_"}[kind]
    for name, entry in entries.items():
        file = entry.get("path_name") if isinstance(entry, dict) else None
        if not isinstance(file, str) or not _MODULE_NAME.match(name):
            raise ModelError(f"{source}: the table of its {kind} is damaged at '{name}'")
        if entry.get("use_pickle") is not False or not re.fullmatch(prefix + r"[0-9]+", file):
            raise ModelError(
                f"{source}: '{name}' is stored as a pickle or a custom object, which could run code when read; export a"
                " program whose weights are plain tensors"
            )
        yield file


def _json(data: bytes, name: str, source: str) -> Any:
    if len(data) > _MAX_JSON:
        raise ModelError(f"{source}: '{name}' is larger than {_MAX_JSON >> 20} MB")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{source}: '{name}' is damaged: {first_line(error)}") from error


def _check_program(program: Any, source: str) -> None:
    """Refuse a program with a name, an operator, a size or a tree that torch would not merely read."""
    stack = [program]
    while stack:
        part = stack.pop()
        if isinstance(part, list):
            stack.extend(part)
            continue
        if not isinstance(part, dict):
            continue
        for key, value in part.items():
            _check_entry(key, value, source)
            # Comments of the exporter, and descriptions that are checked as a whole.
            if key not in ("metadata", "in_spec", "out_spec"):
                stack.append(value)


def _check_entry(key: str, value: Any, source: str) -> None:
    if (
        key == "target"
        and isinstance(value, str)
        and "." in value
        and value.startswith(("torch", "_operator", "math", "#"))
    ):
        if not _OPERATOR.match(value):
            raise UnsupportedError(f"{source}: operator {value} is not one of torch's own; replace it")
    elif key == "target" and value is not None and not (isinstance(value, str) and _MODULE_NAME.match(value)):
        raise ModelError(f"{source}: {str(value)[:80]!r} cannot be an operator")
    elif (
        key in ("name", "as_name", "graph_name")
        and value
        and not (isinstance(value, str) and _MODULE_NAME.match(value))
    ):
        raise ModelError(f"{source}: {str(value)[:80]!r} cannot be the name of a node")
    elif key == "expr_str" and not _is_plain_expression(value):
        raise ModelError(f"{source}: {str(value)[:80]!r} cannot be a symbolic size")
    elif key in ("in_spec", "out_spec") and value is not None:
        _check_tree(value, source)
    elif key in ("as_custom_obj", "as_operator", "custom_obj_values") and value:
        raise UnsupportedError(f"{source}: holds custom objects, which are not supported")


def _is_plain_expression(text: Any) -> bool:
    """Whether ``text`` is arithmetic of symbols: no attribute, no string, no function that torch does not write."""
    if not isinstance(text, str) or len(text) > 10_000:
        return False
    bare = re.sub(r"Symbol\('[a-z]+[0-9]*'((, )?(positive|integer|nonnegative|zero)=(True|False))*\)", "0", text)
    if re.search(r"[^-+*/%(), <>=&|~A-Za-z0-9_]", bare):
        return False
    words = re.findall(r"[A-Za-z_][A-Za-z0-9_]*", bare)
    return all(word in _SYMBOLIC_WORDS or re.fullmatch(r"[suzf][0-9]+", word) for word in words)


def _check_tree(text: Any, source: str) -> None:
    """A tree of arguments or results may be made of tuples, lists and dicts by text."""
    try:
        _, tree = json.loads(text)
        stack = [tree]
        while stack:
            node = stack.pop()
            plain = isinstance(node["context"], str | None) and "__enum__" not in str(node["context"])
            if node["type"] not in _TREE_TYPES or not plain:
                raise UnsupportedError(
                    f"{source}: takes or returns a structure of type {node['type']}; use tuples, lists and dicts"
                )
            stack.extend(node["children_spec"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ModelError(f"{source}: the description of its arguments is damaged") from error
