"""Where a command may write: never into an input, never over something that no earlier run made."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from loraforge.errors import LoraforgeError

# How every report begins; what begins otherwise is not replaced.
REPORT_START = b"<!doctype html"


def input_paths(adapters: Sequence[str], base: object, calibration: object, recipe: str | None) -> list[Path]:
    """The files and folders that a merge reads; ids of models and addresses of data sets are none."""
    paths = [Path(adapter) for adapter in adapters]
    others = [base, *_sources(calibration)]
    if recipe:
        # FILE.yaml#SECTION names a section of the file.
        others.append(recipe.partition("#")[0])
    paths += [Path(text) for text in others if isinstance(text, (str, os.PathLike)) and os.path.exists(text)]
    return paths


def check_place(path: Path, *, overwrite: bool, inputs: Sequence[str | Path]) -> None:
    """Refuses a path that exists (unless `overwrite`), holds or lies in an input, or cannot be written.

    Raises:
        LoraforgeError: With the path and what to do.
    """
    target = path.resolve()
    for source in (Path(text).resolve() for text in inputs):
        if target == source or source in target.parents or target in source.parents:
            what = "the output and an input are in one place; inputs are never changed"
            raise LoraforgeError(what, where=path, got=f"input {source}", expected="a place of its own")
    if path.exists() and not overwrite:
        raise LoraforgeError(
            "the output exists",
            where=path,
            expected="a path that is free",
            hint="choose another path, or add --overwrite to replace it",
        )
    parent = next(folder for folder in target.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise LoraforgeError("the output cannot be written there", where=path, got=f"no writable folder at {parent}")


def check_output(out: Path, *, overwrite: bool, inputs: Sequence[str | Path], resume: bool = False) -> None:
    """Refuses a folder for an adapter by the rules of `check_place` and those of the writer, before any work.

    Raises:
        LoraforgeError: With the path and what to do.
    """
    if resume and not overwrite and (out / "run.json").is_file():
        raise LoraforgeError(
            "the output is there and whole: there is nothing to resume",
            where=out,
            hint="use it, or add --overwrite (without --resume) to make it anew",
        )
    check_place(out, overwrite=overwrite, inputs=inputs)
    if out.exists():
        from loraforge.storage.atomic import check_target

        check_target(out.resolve(), overwrite)


def check_report(report: Path | None, *, overwrite: bool, inputs: Sequence[str | Path]) -> None:
    """Refuses a report by the rules of `check_place`, and one that would replace anything but a report.

    Raises:
        LoraforgeError: With the path and what to do.
    """
    if report is None:
        return
    check_place(report, overwrite=overwrite, inputs=inputs)
    if report.exists() and not _is_page(report):
        raise LoraforgeError(
            "the report would replace something that is no report",
            where=report,
            expected="a path that is free, or an HTML page",
            hint="choose another path",
        )


def _sources(calibration: object) -> Iterator[Any]:
    """The sources of calibration data, out of one, a list, a mapping by name, or a recipe's {source: ...}."""
    if isinstance(calibration, Mapping):
        values: Any = [calibration["source"]] if "source" in calibration else calibration.values()
    elif isinstance(calibration, (list, tuple)):
        values = calibration
    else:
        yield calibration
        return
    for value in values:
        yield from _sources(value)


def _is_page(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(REPORT_START)).lower() == REPORT_START
