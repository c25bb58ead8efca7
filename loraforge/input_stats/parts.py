"""Joins the parts of a run that several processes collected."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError, raise_problems
from loraforge.input_stats.file import Contents, account, check_out, open_stats, read_one, write_contents
from loraforge.storage.files import SafetensorsFile

# What parts of one run have in common, and what to call it.
_ALIKE = {
    "kind": "kind", "base": "base model", "data": "data, or how it was read", "modules": "modules",
    "dtype": "dtype of the base", "versions": "versions of libraries",
}  # fmt: skip


def merge_stats(
    parts: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], *, overwrite: bool = False
) -> dict[str, Any]:
    """Joins the parts that several processes collected into what one would have given.

    Args:
        parts: All n files of a run with `part`, in any order.
        out: The file to write.
        overwrite: Replace an existing statistics file.

    Returns:
        JSON-ready: out, kind, modules, tokens, samples, batches, parts.

    Raises:
        LoraforgeError: Parts that are missing, given twice, or of another kind, base or data.
    """
    paths = [Path(part) for part in parts]
    check_out(Path(out), overwrite=overwrite)
    if any(path.resolve() == Path(out).resolve() for path in paths):
        raise LoraforgeError("the output is one of the parts", where=out, expected="a file of its own")
    files = [open_stats(path) for path in paths]
    if not files:
        raise LoraforgeError("no part was given", expected="the files of collect-stats --part i/n")
    abouts = [about for _, about in sorted(files, key=lambda item: item[1]["part"])]
    _check_parts(abouts, files)
    tokens = {name: sum(about["tokens"][name] for about in abouts) for name in abouts[0]["modules"]}
    ordered = [file for file, _ in sorted(files, key=lambda item: item[1]["part"])]
    means: dict[str, Tensor] = {}
    for name, count in tokens.items():
        total = torch.zeros(ordered[0].shapes[name], dtype=torch.float64)
        for file, about in zip(ordered, abouts, strict=True):
            total.add_(read_one(file, name), alpha=about["tokens"][name])
        means[name] = total / count
    joined = {**abouts[0], "part": [1, 1], "tokens": tokens}
    joined |= {key: sum(about[key] for about in abouts) for key in ("samples", "batches")}
    write_contents(Path(out), Contents(joined, means))
    return account(joined, Path(out)) | {"parts": [os.fspath(path) for path in paths]}


def _check_parts(abouts: Sequence[Mapping[str, Any]], files: Sequence[tuple[SafetensorsFile, Any]]) -> None:
    """Refuses parts that are not the parts of one run."""
    first, first_path = abouts[0], files[0][0].path
    problems = []
    for file, about in files:
        if "done" in about:  # it holds sums, not means, and not of all batches
            hint = "let its run come to an end: the same command with --resume"
            problems.append(LoraforgeError("a part is the state of an unfinished run", where=file.path, hint=hint))
            continue
        for key, what in _ALIKE.items():
            one, other = (a["base"]["sha256"] if key == "base" else a[key] for a in (files[0][1], about))
            if one != other:
                got = f"{one} and {other}" if key in ("kind", "dtype") else None
                problems.append(LoraforgeError(f"parts of another {what}", where=f"{first_path}, {file.path}", got=got))
    raise_problems(problems)
    n = first["part"][1]
    counted = Counter(about["part"][0] if about["part"][1] == n else 0 for about in abouts)
    if counted != Counter(range(1, n + 1)):
        raise LoraforgeError(
            "these are not the parts of one run",
            where=", ".join(str(file.path) for file, _ in files),
            got=", ".join("{}/{}".format(*about["part"]) for about in abouts),
            expected=f"each of the {n} parts once",
        )
