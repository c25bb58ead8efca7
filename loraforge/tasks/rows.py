"""Rows of a task from whatever source, each with what to call it in messages. Knows no model."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from loraforge.calibrate.checks import report_problems
from loraforge.calibrate.data import file_digest
from loraforge.calibrate.images import list_images
from loraforge.calibrate.rows import read_hub_rows, read_json_rows, read_text
from loraforge.errors import LoraforgeError
from loraforge.tasks.fields import extend
from loraforge.tasks.spec import TaskSpec

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
T = TypeVar("T")
_PAIR = ("texts", "labels")
_SHOWN = 5


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The rows of one split.

    Attributes:
        where: The source, for messages.
        names: What to call each row, as "line 3".
        items: The fields of each row.
        sha256: Of the source's bytes; of rows in memory, of what they hold.
        folder: What relative paths of images count from.
    """

    where: str
    names: list[str]
    items: Sequence[Mapping[str, Any]]
    sha256: str
    folder: Path | None

    def __len__(self) -> int:
        return len(self.items)

    def place(self, index: int) -> str:
        """Source and row, for messages."""
        return f"{self.where}, {self.names[index]}"

    def each(self, make: Callable[[Mapping[str, Any], str], T], chosen: Iterable[int] | None = None) -> list[T]:
        """What `make(item, where)` gives for every row, or for the chosen ones.

        Raises:
            LoraforgeError: What it raised, the first problems of all rows at once.
        """
        found: list[T] = []
        problems: list[tuple[int, LoraforgeError]] = []
        for i in range(len(self)) if chosen is None else chosen:
            try:
                found.append(make(self.items[i], self.place(i)))
            except LoraforgeError as problem:
                problems.append((i, problem))
        report_problems(self._joined(problems))
        return found

    def _joined(self, problems: Iterable[tuple[int, LoraforgeError]]) -> list[LoraforgeError]:
        """One problem for all rows of which the same is said: the first few of them, and how many more."""
        causes: dict[tuple[object, ...], list[tuple[int, LoraforgeError]]] = {}
        for i, problem in problems:
            part = str(problem.where).removeprefix(self.place(i))
            same = (problem.what, problem.got, problem.expected, problem.hint, part)
            causes.setdefault(same, []).append((i, problem))
        found = []
        for rows in causes.values():
            number, first = rows[0]
            part = str(first.where).removeprefix(self.place(number))
            if len(rows) == 1 or not str(first.where).startswith(self.where):
                found.append(first)
                continue
            places = ", ".join(self.names[i] for i, _ in rows[:_SHOWN])
            more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
            where = f"{self.where}, {places}{more}{part}"
            found.append(
                LoraforgeError(first.what, where=where, got=first.got, expected=first.expected, hint=first.hint)
            )
        return found


def read_rows(spec: TaskSpec, split: str) -> Rows:
    """Reads a split of a task, with the fields that the task extracts from others.

    Raises:
        LoraforgeError: The task has no such split, it is empty, missing, damaged or of an unknown kind.
    """
    source, task = spec.source(split), f"task '{spec.id}', {split}"
    if source is None:
        known = [name for name in ("train", "eval", "test") if spec.source(name) is not None]
        raise LoraforgeError(
            f"the task has no '{split}' rows",
            where=f"task '{spec.id}'",
            got=f"only {', '.join(known)}" if known else "no split at all",
            hint=f"add '{split}: FILE' to the task",
        )
    if isinstance(source, Mapping):
        rows = _two_files(source, task)
    elif isinstance(source, str) and source.startswith("hf://"):
        rows = _collect(read_hub_rows(source), source, None, None)
    elif isinstance(source, str | Path):
        rows = _from_path(Path(source), spec, task)
    elif isinstance(source, Iterable):
        rows = _collect(((f"row {i}", item) for i, item in enumerate(source, 1)), f"{task} (in memory)", None, None)
    else:
        raise LoraforgeError(
            "the task's rows are nothing that can be read",
            where=task,
            got=type(source).__name__,
            expected=f"a file ({', '.join(SUFFIXES)}), a folder of images, hf://NAME or a list of rows",
        )
    if not rows.items:
        raise LoraforgeError(f"the '{split}' split of the task is empty", where=f"{task}: {rows.where}", got="no rows")
    return _extended(rows, spec)


def _extended(rows: Rows, spec: TaskSpec) -> Rows:
    """The rows with the fields that the task takes out of others."""
    if not spec.extract:
        return rows
    items = rows.each(lambda item, where: extend(item, spec.extract, where))
    return Rows(rows.where, rows.names, items, rows.sha256, rows.folder)


def _collect(pairs: Iterable[tuple[str, Any]], where: str, digest: str | None, folder: Path | None) -> Rows:
    """Rows of (name, object) pairs; every object must have fields."""
    names, items = [], []
    for name, item in pairs:
        if not isinstance(item, Mapping):
            raise LoraforgeError(
                "a row must be an object with fields",
                where=f"{where}, {name}",
                got=type(item).__name__,
                expected='{"text": "...", "label": "..."}',
            )
        names.append(name)
        items.append(item)
    return Rows(where, names, items, digest or _content_digest(items), folder)


def _content_digest(items: Iterable[Mapping[str, Any]]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(item, sort_keys=True, default=repr).encode() + b"\n")
    return digest.hexdigest()


def _from_path(path: Path, spec: TaskSpec, task: str) -> Rows:
    if path.is_dir():
        return _from_images(path)
    if not path.is_file():
        raise LoraforgeError("the task's file does not exist", where=f"{task}: {path}", hint="check the path")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise LoraforgeError(
            "unknown kind of task file",
            where=f"{task}: {path}",
            got=suffix or "no suffix",
            expected=", ".join(SUFFIXES),
        )
    if spec.columns and suffix not in (".csv", ".tsv"):
        raise LoraforgeError("'columns' names the columns of .csv and .tsv files alone", where=f"{task}: {path}")
    if suffix == ".parquet":
        pairs = _parquet_rows(path)
    elif suffix in (".csv", ".tsv"):
        pairs = _table_rows(path, spec.columns)
    else:
        pairs = read_json_rows(path)
    return _collect(pairs, str(path), file_digest(path), path.parent)


def _from_images(folder: Path) -> Rows:
    """Image files below a folder, the class of each its sub-folder."""
    paths, classes = list_images(folder)
    if classes is None:
        raise LoraforgeError(
            "the images of a task lie in one sub-folder a class",
            where=folder,
            got="images beside the sub-folders, or none",
            expected="folder/CLASS/image.png; or a file of rows with the fields image and label",
        )
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.relative_to(folder).as_posix()} {file_digest(path)}\n".encode())
    names = [path.relative_to(folder).as_posix() for path in paths]
    items: list[Mapping[str, Any]] = [
        {"image": name, "label": label} for name, label in zip(names, classes, strict=True)
    ]
    return Rows(str(folder), names, items, digest.hexdigest(), folder)


def _two_files(source: Mapping[str, Any], task: str) -> Rows:
    """{texts: FILE, labels: FILE}: line i of one belongs to line i of the other."""
    if set(source) != set(_PAIR):
        got, expected = ", ".join(map(str, source)) or "nothing", "{texts: FILE, labels: FILE}"
        raise LoraforgeError("a source of two files names 'texts' and 'labels'", where=task, got=got, expected=expected)
    paths = [Path(str(source[name])) for name in _PAIR]
    for path in paths:
        if not path.is_file():
            raise LoraforgeError("the task's file does not exist", where=f"{task}: {path}", hint="check the path")
    texts, labels = (read_text(path).split("\n") for path in paths)
    for lines in (texts, labels):
        if lines[-1] == "":
            lines.pop()
    if len(texts) != len(labels):
        raise LoraforgeError(
            "the two files of the task differ in length",
            where=f"{task}: {paths[0]} and {paths[1]}",
            got=f"{len(texts)} texts and {len(labels)} labels",
        )
    items: list[Mapping[str, Any]] = [
        {"text": text.rstrip("\r"), "label": label.strip()} for text, label in zip(texts, labels, strict=True)
    ]
    digest = hashlib.sha256("".join(map(file_digest, paths)).encode()).hexdigest()
    return _collect(((f"line {i}", item) for i, item in enumerate(items, 1)), str(paths[0]), digest, paths[0].parent)


def _table_rows(path: Path, columns: Iterable[str] | None) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of a .csv file (quoted as usual) or a .tsv file (a quote is a letter like any other)."""
    lines = _csv_lines(path) if path.suffix.lower() == ".csv" else _tsv_lines(path)
    names = list(columns or ())
    for number, cells in lines:
        if not names or cells == names:
            names = names or [cell.strip() for cell in cells]
            continue
        if len(cells) != len(names):
            raise LoraforgeError(
                "the row has another number of columns than the table",
                where=f"{path}, line {number}",
                got=f"{len(cells)} columns",
                expected=f"{len(names)}: {', '.join(names)}",
                hint=None if columns else "for a file without a header name its columns: columns: [label, text]",
            )
        yield f"line {number}", dict(zip(names, cells, strict=True))


def _tsv_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield number, line.rstrip("\r").split("\t")


def _csv_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        for cells in reader:
            if cells:
                yield reader.line_num, cells
    except csv.Error as error:
        raise LoraforgeError(
            "the row is not valid CSV", where=f"{path}, line {reader.line_num}", got=str(error)
        ) from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise LoraforgeError(
            ".parquet files need the library 'pyarrow', which is not installed",
            where=path,
            hint="pip install 'loraforge[data]'",
        ) from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise LoraforgeError("the data file cannot be read", where=path, got=str(error).split("\n")[0]) from error
    yield from ((f"row {i}", row) for i, row in enumerate(rows, 1))
