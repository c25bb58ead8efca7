from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from loraforge.errors import CheckFailed, InputProblems, LoraforgeError, UsageError

from .conftest import FakeMerge, only_object

Run = Callable[..., Result]

RAISED = [
    (LoraforgeError("the file is damaged", where="a.safetensors", got="3 bytes"), 3, "input"),
    (UsageError("unknown parameter 'x'", hint="did you mean 'y'?"), 2, "usage"),
    (CheckFailed("the kernel is wrong", where="gram_"), 4, "check"),
    (InputProblems([LoraforgeError("one"), LoraforgeError("two", where="b")]), 3, "input"),
    (OSError(errno.ENOSPC, "No space left on device", "out/adapter_model.safetensors"), 3, "input"),
    (PermissionError(errno.EACCES, "Permission denied", "secret"), 3, "input"),
    (ZeroDivisionError("division by zero"), 1, "internal"),
    (RuntimeError("first line\nsecond line"), 1, "internal"),
    (KeyboardInterrupt(), 130, "interrupted"),
]


@pytest.mark.parametrize(("raised", "code", "kind"), RAISED, ids=lambda value: type(value).__name__)
def test_an_exception_becomes_its_exit_code_and_one_object(
    raised: BaseException, code: int, kind: str, run: Run, fake_merge: FakeMerge, tmp_path: Path
) -> None:
    fake_merge.raises = raised
    command = ("merge", "a", "b", "-m", "svd", "-o", tmp_path / "out")
    plain, as_json = run(*command), run(*command, "--json")
    assert plain.exit_code == as_json.exit_code == code
    assert plain.stdout == ""
    assert plain.stderr.startswith("error: ")
    assert "\x1b" not in plain.stderr and "Traceback" not in plain.stderr
    error = only_object(as_json)["error"]
    assert (error["exit_code"], error["kind"]) == (code, kind)
    assert error["what"] in plain.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_message_names_file_found_and_next_step(run: Run, fake_merge: FakeMerge, tmp_path: Path) -> None:
    fake_merge.raises = LoraforgeError("cut off", where="x.bin", got="7 bytes", expected="a header", hint="fetch it")
    command = ("merge", "a", "-m", "svd", "-o", tmp_path / "out", "--json")
    result = run(*command)
    assert result.stderr == "error: cut off\n  where: x.bin\n  found: 7 bytes\n  expected: a header\n  next: fetch it\n"
    known = {"what": "cut off", "where": "x.bin", "found": "7 bytes", "expected": "a header", "next": "fetch it"}
    assert only_object(result) == {"error": {"kind": "input", "exit_code": 3, **known}}


def test_all_problems_are_listed(run: Run, fake_merge: FakeMerge, tmp_path: Path) -> None:
    fake_merge.raises = InputProblems([LoraforgeError("one", where="a"), LoraforgeError("two", where="b")])
    result = run("merge", "a", "b", "-m", "svd", "-o", tmp_path / "out", "--json")
    problems = only_object(result)["error"]["problems"]
    assert [(problem["what"], problem["where"]) for problem in problems] == [("one", "a"), ("two", "b")]
    assert "1. one" in result.stderr and "2. two" in result.stderr


def test_the_file_of_an_os_error_is_named(run: Run, fake_merge: FakeMerge, tmp_path: Path) -> None:
    fake_merge.raises = OSError(errno.ENOSPC, "No space left on device", "out/x.safetensors")
    result = run("merge", "a", "-m", "svd", "-o", tmp_path / "out")
    assert "no space left on device" in result.stderr and "out/x.safetensors" in result.stderr


def test_only_debug_prints_the_traceback(run: Run, fake_merge: FakeMerge, tmp_path: Path) -> None:
    fake_merge.raises = ZeroDivisionError("division by zero")
    command = ("merge", "a", "-m", "svd", "-o", tmp_path / "out")
    assert "--debug" in run(*command).stderr
    result = run(*command, "--debug")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr and "division by zero" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["merg"], ["no such command 'merg'", "'merge'"]),
        (["merge", "a", "--methd", "svd"], ["--methd", "did you mean '--method'"]),
        (["merge", "a", "--rank", "many"], ["--rank"]),
        (["merge", "a", "--rank", "0"], ["--rank"]),
        (["merge", "a", "--dtype", "int8"], ["--dtype", "bfloat16"]),
        (["merge", "a", "--out"], ["--out"]),
        (["inspect"], ["ADAPTER"]),
        (["methods", "a", "b"], ["b"]),
    ],
)
def test_a_wrong_command_line_is_code_2(arguments: list[str], words: list[str], run: Run) -> None:
    plain, as_json = run(*arguments), run(*arguments, "--json")
    assert plain.exit_code == as_json.exit_code == 2
    assert all(word in plain.stderr for word in words), plain.stderr
    assert "--help'" in plain.stderr and plain.stdout == ""
    assert only_object(as_json)["error"]["kind"] == "usage"


def test_json_behind_the_end_of_options_is_an_argument(run: Run) -> None:
    result = run("methods", "--", "--json")
    assert result.exit_code == 2 and result.stdout == "" and "'--json'" in result.stderr


def test_no_command_prints_the_help_as_a_usage_error(run: Run) -> None:
    result = run()
    assert result.exit_code == 2
    assert "merge" in result.stderr and result.stdout == ""


def test_version(run: Run) -> None:
    result = run("--version")
    assert result.exit_code == 0 and result.stdout.startswith("loraforge ")
