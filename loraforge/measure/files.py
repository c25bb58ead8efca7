"""Files of measurements: lines of JSON, one a head, that are taken up where a run broke off. Torch-free."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from loraforge.errors import LoraforgeError
from loraforge.measure.heads.layout import HeadKey
from loraforge.storage.atomic import write_whole
from loraforge.storage.leftovers import hold_file

# Files of a run's folder, named as the document names them.
SUBSET, SUBSET_ABOUT = "eval_subset.json", "eval_subset.meta.json"
IMPORTANCE = {"pre": "importance_pre.jsonl", "post": "importance_post.jsonl"}
FISHER, UPDATE, SPECTRUM = "gradfisher_pre.jsonl", "update.jsonl", "spectrum.jsonl"
HEADS, STATS, CASES = "heads.csv", "stats.json", "cases.json"
LAYOUT, CONFIG, REPORT = "layout.json", "run_config.json", "report.html"
INITIAL, FINAL = "ckpt_init", "ckpt_final"
# Packages whose versions decide the numbers.
PACKAGES = ("torch", "transformers", "peft", "numpy")


def json_number(value: Any) -> Any:
    """The value with NaN and infinities as None, which JSON knows; mappings and lists inside as well."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): json_number(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_number(item) for item in value]
    return value


def key_of(line: Mapping[str, Any], stack: str = "enc") -> HeadKey:
    """The head of a line; the document's files say layer and head alone."""
    return HeadKey(str(line.get("stack") or stack), str(line.get("kind") or "self"), line["layer"], line["head"])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a finished file, ours or the document's.

    Raises:
        LoraforgeError: It is not there, or a line is no object with `layer` and `head`, or a head comes twice.
    """
    if not path.is_file():
        raise LoraforgeError("the measurement is not there", where=path, hint="loraforge measure run makes all of them")
    found: list[dict[str, Any]] = []
    seen: set[HeadKey] = set()
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            key = key_of(line)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LoraforgeError(
                "a line of the measurement cannot be read", where=f"{path}, line {number}", got=text[:80],
                expected='{"layer": 0, "head": 0, ...}',
            ) from error  # fmt: skip
        if key in seen:
            got = f"layer {key.layer}, head {key.head} again"
            raise LoraforgeError("a head comes twice", where=f"{path}, line {number}", got=got)
        seen.add(key)
        found.append(line)
    return found


def check_free(path: Path, *, overwrite: bool) -> None:
    """Refuses a file's place that is taken.

    Raises:
        LoraforgeError: The file is there and may not be replaced.
    """
    if path.exists() and not overwrite:
        raise LoraforgeError("the output exists", where=path, hint="choose another place, or add --overwrite")


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> Path:
    """Writes a finished file, whole or not at all; numbers that are not finite become null."""
    text = "".join(json.dumps(json_number(dict(line)), allow_nan=False) + "\n" for line in lines)
    write_whole(path, text)
    return path


def write_json(path: Path, content: Any) -> Path:
    """Writes a JSON file, whole or not at all; numbers that are not finite become null."""
    write_whole(path, json.dumps(json_number(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def log_of(path: Path) -> Path:
    """Where the lines of a file are until it is complete; not where `write_whole` drafts it."""
    return path.with_name(f".{path.name}.lines")


class LineLog:
    """A file of lines that grows beside its place and gets its name when it is complete; a context manager.

    A broken-off run leaves `.NAME.lines`: its first line says what the lines depend on; a run with the same settings
    goes on behind the last whole line, any other starts anew. It is locked while a run writes it.

    Args:
        path: The finished file.
        settings: JSON-ready: everything that decides the lines.

    Raises:
        LoraforgeError: Another run is writing it.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.part = log_of(path)
        self.settings = json.loads(json.dumps(dict(settings), sort_keys=True, default=str))
        self.lines: list[dict[str, Any]] = []
        # Not buffered: what the disk refused is not tried again when the file is closed.
        self._file = os.fdopen(hold_file(self.part, path), "r+b", buffering=0)
        try:
            self._take_up()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def done(self) -> set[HeadKey]:
        """Heads that have their line already."""
        return {key_of(line) for line in self.lines}

    def add(self, line: Mapping[str, Any]) -> None:
        """Appends a line and hands it to the disk."""
        content = json_number(dict(line))
        self._append(content)
        self.lines.append(content)

    def finish(self, lines: Iterable[Mapping[str, Any]] | None = None) -> list[dict[str, Any]]:
        """Gives the file its name; `lines` (default: those added, in their order) are what it then holds."""
        kept = [dict(line) for line in (self.lines if lines is None else lines)]
        write_lines(self.path, kept)
        self.part.unlink(missing_ok=True)
        self.close()
        return kept

    def close(self) -> None:
        """Lets go of the lines so far; another run may take them up."""
        self._file.close()

    def _append(self, content: Mapping[str, Any]) -> None:
        left = (json.dumps(content, allow_nan=False) + "\n").encode()
        while left:
            left = left[self._file.write(left) or 0 :]
        os.fsync(self._file.fileno())

    def _take_up(self) -> None:
        """The whole lines of an earlier part with equal settings; what is behind them, or all of another, goes."""
        whole: list[dict[str, Any]] = []
        size = 0
        for text in self._file.readall().splitlines(keepends=True):
            try:
                line = json.loads(text) if text.endswith(b"\n") else None
            except ValueError:
                line = None
            if not isinstance(line, dict) or (not whole and line != {"settings": self.settings}):
                break
            whole.append(line)
            size += len(text)
        self._file.truncate(size)
        self.lines = whole[1:]
        if not whole:
            self._append({"settings": self.settings})
