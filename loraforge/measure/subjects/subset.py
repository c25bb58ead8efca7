"""Which rows a measurement is taken on: the same in every pass, in every run, and in a file. Torch-free."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraforge.errors import LoraforgeError, raise_problems
from loraforge.measure.files import SUBSET, SUBSET_ABOUT, write_json

SEED = 999


def choose_subset(size: int, n: int | None, seed: int = SEED) -> list[int]:
    """The first `n` of a shuffle of all rows, as the document draws them.

    Args:
        size: Rows that there are.
        n: Rows wanted; all of them where there are fewer, or with None.
        seed: Of `random.Random`.

    Returns:
        Row numbers in the order of the shuffle.
    """
    order = list(range(size))
    random.Random(seed).shuffle(order)
    return order[:n]


def write_subset(folder: Path, indices: Sequence[int], meta: Mapping[str, Any]) -> Path:
    """Writes the rows as a list of numbers, which the document's programs read, and beside it what they were drawn of.

    Args:
        folder: Of the run.
        indices: Row numbers, in order.
        meta: At least `size` and `data_sha256`, which `read_subset` compares; usually `seed` too.

    Returns:
        The file of the list.
    """
    write_json(folder / SUBSET_ABOUT, {**meta, "n": len(indices)})
    return write_json(folder / SUBSET, list(indices))


def read_subset(path: Path, *, size: int, data_sha256: str | None = None) -> list[int]:
    """The rows of a file, checked against the data; never drawn anew.

    Args:
        path: A JSON list of row numbers, ours or the document's, or the folder that holds it.
        size: Rows of the data.
        data_sha256: Of the data, compared with the file's sibling where there is one.

    Raises:
        LoraforgeError: Not there, no such list, rows that the data does not have, or drawn of other data.
    """
    path = path / SUBSET if path.is_dir() else path
    indices = _read_json(path)
    whole = isinstance(indices, list) and all(type(index) is int for index in indices)
    if not whole or not indices:
        got = "an empty list" if indices == [] else type(indices).__name__
        raise LoraforgeError("the subset is no list of row numbers", where=path, got=got, expected="[12, 5, ...]")
    problems = []
    if len(set(indices)) < len(indices):
        problems.append(LoraforgeError("the subset has rows twice", where=path, got=f"{len(indices)} numbers"))
    outside = sorted({index for index in indices if not 0 <= index < size})
    if outside:
        got, expected = f"row {outside[0]} and {len(outside) - 1} more", f"0 to {size - 1}"
        problems.append(LoraforgeError("the subset names rows that the data does not have", where=path, got=got,
                                       expected=expected))  # fmt: skip
    beside = path.with_name(SUBSET_ABOUT)
    about = _read_json(beside) if path.name == SUBSET and beside.is_file() else {}
    now = {"size": size, "data_sha256": data_sha256}
    for key, value in now.items():
        if isinstance(about, dict) and None not in (value, about.get(key)) and about[key] != value:
            what = "the subset was drawn of other data"
            hint = "measure with the data of then, or take the file away to draw anew"
            problems.append(LoraforgeError(what, where=path, got=f"{key} {value}", expected=about[key], hint=hint))
    raise_problems(problems)
    return list(indices)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoraforgeError("the subset cannot be read", where=path, got=str(error)) from error
