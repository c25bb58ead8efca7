"""The one place where exceptions become exit codes, lines on stderr and, with `--json`, an object on stdout.

Exit codes: 0 done, 1 internal, 2 usage, 3 bad input, 4 a check failed, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from loraforge.errors import InputProblems, LoraforgeError, UsageError

INTERNAL, USAGE, BAD_INPUT, CHECK_FAILED, INTERRUPTED = 1, 2, 3, 4, 130
KINDS = {INTERNAL: "internal", USAGE: "usage", BAD_INPUT: "input", CHECK_FAILED: "check", INTERRUPTED: "interrupted"}


def payload(error: LoraforgeError, code: int) -> dict[str, Any]:
    """The parts of an error that are known, ready for JSON."""
    parts = {
        "what": error.what,
        "where": error.where,
        "found": error.got,
        "expected": error.expected,
        "next": error.hint,
    }
    known: dict[str, Any] = {"kind": KINDS.get(code, "internal"), "exit_code": code}
    known.update({label: value for label, value in parts.items() if value is not None})
    if isinstance(error, InputProblems):
        known["problems"] = [payload(problem, problem.exit_code) for problem in error.problems]
    return known


def from_os_error(error: OSError) -> LoraforgeError:
    """A refusal of the operating system (missing file, permission, disk full) as an input error that names the file."""
    reason = error.strerror or str(error) or type(error).__name__
    return LoraforgeError(reason[:1].lower() + reason[1:], where=error.filename)


def is_parser_error(error: Exception) -> bool:
    """Whether the option parser raised it. Its classes moved between releases of Typer; what they can do did not."""
    return callable(getattr(error, "format_message", None)) and hasattr(error, "exit_code")


def from_parser(error: Any) -> UsageError:
    """A complaint of the option parser as a usage error that names the help to read."""
    context = getattr(error, "ctx", None)
    message = str(error.format_message()).replace("Value error, ", "")
    possible = list(getattr(error, "possibilities", None) or ())
    if possible:
        message, suggestion = error.message, f"did you mean '{possible[0]}'? "
    else:
        suggestion = ""
    command = context.command_path if context is not None else "loraforge"
    return UsageError(message[:1].lower() + message[1:].rstrip("."), hint=f"{suggestion}see '{command} --help'")


def from_unexpected(error: Exception) -> LoraforgeError:
    """Anything that no room foresaw: a fault of the program, said so in one line."""
    first = str(error).strip().splitlines()
    detail = f": {first[0]}" if first else ""
    return LoraforgeError(
        f"internal error: {type(error).__name__}{detail}", hint="run the same command with --debug for the traceback"
    )


def translate(error: Exception) -> tuple[LoraforgeError, int]:
    """The message and the exit code of an exception that reached the command line."""
    if isinstance(error, LoraforgeError):
        return error, error.exit_code
    if is_parser_error(error):
        return from_parser(error), USAGE
    if isinstance(error, OSError):
        return from_os_error(error), BAD_INPUT
    return from_unexpected(error), INTERNAL


def has_flag(arguments: Sequence[str], flag: str) -> bool:
    """Whether a flag stands among the arguments; needed where parsing itself failed."""
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return flag in options


def fail(error: LoraforgeError, code: int, *, as_json: bool) -> NoReturn:
    """Prints the error on stderr and, with `as_json`, as the only object on stdout, then leaves with the code.

    Raises:
        SystemExit: Always.
    """
    typer.secho("error: ", err=True, nl=False, bold=True, fg="red" if "NO_COLOR" not in os.environ else None)
    typer.echo(error.render(), err=True)
    if as_json:
        typer.echo(json.dumps({"error": payload(error, code)}, ensure_ascii=False))
    sys.exit(code)


class Boundary(TyperGroup):
    """The top-level command group: runs a command and turns whatever it raises into the codes above."""

    def main(  # type: ignore[override]  # one way of running: the parser's own printing and exiting is never wanted
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> NoReturn:
        """Runs one command line and leaves with its exit code.

        Raises:
            SystemExit: Always, with the exit code.
        """
        arguments = list(sys.argv[1:] if args is None else args)
        as_json, debug = has_flag(arguments, "--json"), has_flag(arguments, "--debug")
        extra["standalone_mode"] = False
        try:
            code = super().main(args=arguments, prog_name=prog_name, **extra)
        except (typer.Abort, KeyboardInterrupt):
            code = INTERRUPTED
        except Exception as error:  # the outermost frame: everything below it is specific
            if debug:
                traceback.print_exc(file=sys.stderr)
            message, code = translate(error)
            fail(message, code, as_json=as_json)
        if code == INTERRUPTED:
            fail(LoraforgeError("interrupted; nothing was left half-written"), INTERRUPTED, as_json=as_json)
        sys.exit(code or 0)
