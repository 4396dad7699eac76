"""The command ``pumice``: sub-commands, exit codes, and how errors reach a person."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any

from pumice.errors import PumiceError

COMMANDS = ("inspect", "targets", "compile", "tune", "advise", "run", "verify", "bundle", "bench", "report", "demo")

_EXIT_CODES = """\
exit codes: 0 fine, 1 unexpected error, 2 usage, 3 bad model or mask, 4 unsupported operator or target,
5 a missing tool or package, 6 numbers that differ (verify) or an accuracy that is missed
(advise), 7 a time or size that is missed (advise). PUMICE_DEBUG=1 shows where an error came from."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. Raises SystemExit for ``-h`` and for arguments that do not parse."""
    warnings.showwarning = _show_warning
    args = _parser().parse_args(argv)
    try:
        import_module(f"pumice.commands.{args.command}").run(args)
        sys.stdout.flush()
        return 0
    except PumiceError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt as stopped:
        return _fail(str(stopped) or "interrupted", 130)
    except BrokenPipeError:  # the reader, such as `head`, has gone: nothing is wrong and nobody listens
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        lines = str(error).strip().splitlines()
        what = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
        return _fail(f"unexpected error ({what}); run again with PUMICE_DEBUG=1 to see where", 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pumice",
        description="Compile trained PyTorch and ONNX models into small, sparse int8 libraries.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pumice {version('pumice')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        import_module(f"pumice.commands.{name}").add_parser(commands)
    return parser


def _fail(message: str, code: int) -> int:
    if os.environ.get("PUMICE_DEBUG"):
        traceback.print_exc()
    print(f"pumice: {_clean(message)}", file=sys.stderr)
    return code


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        print(f"pumice: warning: {_clean(str(message))}", file=sys.stderr)


def _clean(message: str) -> str:
    """A model's names may hold escape sequences, and be long: neither reaches the terminal."""
    from pumice.report_table import clean, shorten

    return shorten(clean(message), 2000)


if __name__ == "__main__":
    sys.exit(main())
