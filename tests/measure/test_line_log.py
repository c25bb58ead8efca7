"""The log of lines: taken up by equal settings alone, by one run at a time, and not lost with a full disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loraforge.errors import LoraforgeError
from loraforge.measure.files import LineLog, log_of, read_lines

LINES = [{"layer": 0, "head": head, "I": 0.5 * head} for head in range(3)]


def logged(path: Path, *lines: dict[str, Any], settings: int = 1) -> None:
    with LineLog(path, {"a": settings}) as log:
        for line in lines:
            log.add(line)


def test_a_log_is_taken_up_by_equal_settings(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    logged(out, *LINES[:2])
    with LineLog(out, {"a": 1}) as log:
        assert log.lines == LINES[:2]
        log.add(LINES[2])
        log.finish()
    assert read_lines(out) == LINES and os.listdir(tmp_path) == ["a.jsonl"]


@pytest.mark.parametrize(
    "tail", [b'{"layer": 0, "he', b'{"layer": 0, "head": 9}', b"\xff\xfe\n", b"null\n"],
    ids=["torn", "no end", "bytes", "no object"],
)  # fmt: skip
def test_what_is_behind_the_last_whole_line_goes(tail: bytes, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    logged(out, LINES[0])
    with log_of(out).open("ab") as file:
        file.write(tail)
    logged(out, LINES[1])
    with LineLog(out, {"a": 1}) as log:
        assert log.lines == LINES[:2]


@pytest.mark.parametrize(
    "first", [b"", b"\n", b"[]\n", b'{"layer": 0, "head": 0}\n'], ids=["none", "empty", "list", "line"]
)
def test_a_log_without_its_settings_starts_anew(first: bytes, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    log_of(out).write_bytes(first + json.dumps(LINES[0]).encode() + b"\n")
    with LineLog(out, {"a": 1}) as log:
        assert log.lines == []
    assert log_of(out).read_text() == '{"settings": {"a": 1}}\n'


def test_other_settings_start_anew(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    logged(out, *LINES)
    logged(out, LINES[0], settings=2)
    with LineLog(out, {"a": 2}) as log:
        assert log.lines == LINES[:1]


def test_one_run_at_a_time(tmp_path: Path) -> None:
    """Lines of two runs with different settings must not come into one log."""
    out = tmp_path / "a.jsonl"
    child = f"""
from pathlib import Path
from loraforge.measure.files import LineLog
LineLog(Path({str(out)!r}), {{'a': 2}})
"""
    with LineLog(out, {"a": 1}) as log:
        log.add(LINES[0])
        done = subprocess.run([sys.executable, "-c", child], capture_output=True, check=False, text=True)
        assert done.returncode and "Another run is writing this output" in done.stderr
        with pytest.raises(LoraforgeError, match="Another run"):
            LineLog(out, {"a": 1})
    logged(out, LINES[1])
    with LineLog(out, {"a": 1}) as log:
        assert log.lines == LINES[:2]


def test_a_full_disk_at_the_end_leaves_the_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hours of measuring are taken up when there is space again."""
    out = tmp_path / "a.jsonl"
    plain = os.fsync

    def full(handle: int) -> None:
        if os.path.samestat(os.fstat(handle), os.stat(log_of(out))):
            plain(handle)
        else:
            raise OSError(28, "No space left on device")

    with LineLog(out, {"a": 1}) as log:
        for line in LINES:
            log.add(line)
        monkeypatch.setattr("loraforge.storage.atomic.os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            log.finish()
        monkeypatch.undo()
    assert os.listdir(tmp_path) == [log_of(out).name]
    with LineLog(out, {"a": 1}) as log:
        assert log.lines == LINES
