"""Files of an update: where they go, and the lines as the document has them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraforge.errors import LoraforgeError, UsageError
from loraforge.measure.files import check_free
from loraforge.measure.heads.layout import HeadLayout

# What the document's own file has.
DOCUMENT_KEYS = ("layer", "head", "U", "Urel", "Uq", "Uk", "Uv", "Uo")


def output_files(
    out: str | os.PathLike[str] | None, name: str, *, overwrite: bool, more: Sequence[str] = ()
) -> list[Path]:
    """Files of a measurement: its lines (or its JSON), its meta file, and more beside; none for None.

    Args:
        out: The first file, told by its suffix, or the folder for `name`.
        name: Usual name of the first file.
        overwrite: They may exist.
        more: Names of further files.

    Raises:
        LoraforgeError: One exists and may not be replaced.
    """
    if out is None:
        return []
    path = Path(out)
    path = path if path.suffix == Path(name).suffix else path / name
    files = [path, *([path.with_name(f"{path.stem}.meta.json")] if path.suffix == ".jsonl" else [])]
    files += [path.with_name(other) for other in more]
    for file in files:
        check_free(file, overwrite=overwrite)
    return files


def document_lines(lines: Sequence[Mapping[str, Any]], layout: HeadLayout) -> list[dict[str, Any]]:
    """The lines with exactly the document's keys.

    Raises:
        LoraforgeError: The model has several stacks or kinds of attention, which those keys cannot tell apart.
    """
    if not layout.is_plain:
        raise LoraforgeError(
            "the document's files name a head by layer and head alone", where="--profile document",
            got="several stacks or kinds of attention", hint="leave --profile out",
        )  # fmt: skip
    return [{key: line[key] for key in DOCUMENT_KEYS} for line in lines]


def checked_word(option: str, value: str, words: Sequence[str]) -> str:
    """The word itself; `seed` is another name of `document`.

    Raises:
        UsageError: It is none of those allowed.
    """
    value = "document" if value == "seed" and "document" in words else value
    if value not in words:
        raise UsageError("unknown word", where=option, got=value, expected=" | ".join(words))
    return value
