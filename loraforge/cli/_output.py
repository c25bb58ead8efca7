"""What a command prints: one JSON object or tables on stdout, everything else on stderr."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any, Literal, TextIO

if TYPE_CHECKING:
    from rich.console import Console

ProgressCallback = Callable[[str, str, int, int], None]

# A table that is not read on a terminal is never wrapped or cut.
UNLIMITED = 10_000


def json_ready(value: Any) -> Any:
    """The value with mappings, sequences and numbers as JSON knows them: paths as text, NaN and infinities as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [json_ready(item) for item in value]
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


def human_bytes(count: float) -> str:
    """A size in the largest binary unit that leaves at least one."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def human_number(value: object) -> str:
    """A number short enough for a table; anything else as text, None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:.4g}"


class Output:
    """The voice of one command.

    Args:
        as_json: Print one JSON object on stdout and nothing else there.
        quiet: Print errors only.
        verbose: Print details: a line a module, progress without a terminal.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.verbose = verbose and not quiet
        self._stdout: TextIO = sys.stdout

    @property
    def is_human(self) -> bool:
        """Whether tables are wanted on stdout."""
        return not (self.as_json or self.quiet)

    def has_room(self, columns: int) -> bool:
        """Whether a table of so many columns of text fits; what is piped has room for any."""
        return not self._stdout.isatty() or shutil.get_terminal_size().columns >= columns

    @contextmanager
    def session(self) -> Iterator[Output]:
        """The time in which a command works: warnings go to stderr as lines, and with JSON prints of libraries too."""
        with warnings.catch_warnings():
            warnings.showwarning = self._show_warning
            with _environment({"TQDM_DISABLE": "1"}, unless=self.verbose):
                if not self.as_json:
                    yield self
                    return
                with redirect_stdout(sys.stderr):
                    yield self

    def result(self, value: Mapping[str, Any] | Sequence[Any]) -> None:
        """Prints the object of `--json`; nothing in any other mode."""
        if self.as_json:
            self._stdout.write(json.dumps(json_ready(value), ensure_ascii=False) + "\n")
            self._stdout.flush()

    def line(self, text: str = "") -> None:
        """Prints a line for people on stdout."""
        if self.is_human:
            self._stdout.write(text + "\n")

    def note(self, text: str) -> None:
        """Prints a line on stderr."""
        if not self.quiet:
            sys.stderr.write(text + "\n")

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None) -> None:
        """Prints a table for people on stdout: numbers to the right, text to the left."""
        if not self.is_human:
            return
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
        for i, header in enumerate(headers):
            numeric = all(isinstance(row[i], (int, float)) or row[i] is None for row in rows)
            justify: Literal["left", "right"] = "right" if numeric else "left"
            # Words may be wrapped on a narrow terminal, names and numbers only when nothing else is left.
            table.add_column(Text(header), justify=justify, overflow="fold", no_wrap=numeric or i == 0)
        if title:
            # Above the table, not in it: a table wraps its title to its own width.
            self.line(f"\n{title}")
        for row in rows:
            table.add_row(*(Text(human_number(cell)) for cell in row))
        if self._stdout.isatty():
            _console(self._stdout).print(table)
            return
        page = io.StringIO()
        _console(page).print(table)
        lines = (line.rstrip() for line in page.getvalue().splitlines())
        self._stdout.write("".join(f"{line}\n" for line in lines if line))

    @contextmanager
    def progress(self) -> Iterator[ProgressCallback | None]:
        """A callable `(stage, detail, done, total)`: bars on a terminal, lines with `-v`, else None."""
        if self.quiet or not sys.stderr.isatty():
            yield self._stage_lines() if self.verbose else None
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn())
        detail = TextColumn("{task.fields[detail]}", markup=False)
        with Progress(*columns, TimeElapsedColumn(), detail, console=_console(sys.stderr), transient=True) as bars:
            tasks: dict[str, Any] = {}

            def advance(stage: str, detail: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bars.add_task(stage, total=total, detail=detail)
                bars.update(tasks[stage], completed=done, total=total, detail=detail)

            yield advance

    def _stage_lines(self) -> ProgressCallback:
        seen: set[tuple[str, str]] = set()

        def advance(stage: str, detail: str, done: int, total: int) -> None:
            if (stage, detail) not in seen:
                seen.add((stage, detail))
                self.note(f"{stage} {done}/{total} {detail}".rstrip())

        return advance

    def _show_warning(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        self.note(f"warning: {message}" + (f" ({filename}:{lineno})" if self.verbose else ""))


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    width = None if stream.isatty() else UNLIMITED
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


@contextmanager
def _environment(values: Mapping[str, str], *, unless: bool) -> Iterator[None]:
    """Sets variables that are not set yet and takes them back afterwards."""
    fresh = {} if unless else {key: value for key, value in values.items() if key not in os.environ}
    os.environ.update(fresh)
    try:
        yield
    finally:
        for key in fresh:
            os.environ.pop(key, None)
