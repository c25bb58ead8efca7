"""The file of input statistics: what is in it, how it is written, read and matched to modules.

One .safetensors: a float64 tensor a module, (d,) for `diag` or (d, d) for `gram`, each a mean over tokens, under the
model's own names; and one metadata entry, JSON, that says what it was made of.
"""

from __future__ import annotations

import json
import os
import secrets
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError, UsageError, raise_problems
from loraforge.storage.atomic import flush_file
from loraforge.storage.files import SafetensorsFile
from loraforge.storage.stream import save_tensors

KEY = "loraforge.input_stats"
SUFFIX = ".safetensors"
_SHOWN = 8


@dataclass(frozen=True, slots=True, eq=False)
class Contents:
    """What a file holds.

    Attributes:
        about: kind, part (i of n), modules, tokens by module, base, data, sources, samples, batches, dtype, versions.
        tensors: float64 by module.
    """

    about: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def load_stats(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The statistics of every module of a file: a mean over tokens, float64, (d,) or (d, d).

    Raises:
        LoraforgeError: No whole file of input statistics, or only a part of one.
    """
    contents = read_contents(Path(path))
    _refuse_part(contents.about, path)
    return dict(contents.tensors)


def stats_for(
    path: str | os.PathLike[str], modules: Iterable[str], widths: Mapping[str, int] | None = None
) -> dict[str, Tensor]:
    """The squared L2 norm of each input feature a token, for the modules of a merge.

    Names are taken as they are. Those that the file does not have are tried with one leading prefix stripped or added,
    the same for all of them ("bert.encoder..." and "encoder..."). Of a Gram matrix the diagonal is taken.

    Args:
        path: A file of `collect_stats`.
        modules: Dotted names.
        widths: Number of input features of a module; checked where given.

    Returns:
        (d,) float64 by the names that were asked for.

    Raises:
        LoraforgeError: Modules that the file lacks, all named; another width; no such file.
    """
    file, about = open_stats(Path(path))
    _refuse_part(about, path)
    wanted = list(modules)
    names = match_names(wanted, file.shapes)
    missing = [name for name in wanted if name not in names]
    if missing:
        more = f", and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise LoraforgeError(
            "the input statistics lack modules of the merge",
            where=path,
            got=f"no {', '.join(missing[:_SHOWN])}{more}",
            expected=f"all {len(wanted)} modules; the file has {len(file.shapes)}, such as {next(iter(file.shapes))}",
            hint="collect them with --adapter ADAPTER, or without --targets",
        )
    found: dict[str, Tensor] = {}
    problems = []
    for name in wanted:
        stored = names[name]
        width = file.shapes[stored][0]
        if widths is not None and widths.get(name, width) != width:
            what = "the input statistics are of a module of another width"
            problems.append(LoraforgeError(what, where=f"{path}, {stored}", got=width, expected=widths[name]))
            continue
        value = read_one(file, stored)
        found[name] = value.diagonal().clone() if value.ndim == 2 else value
    raise_problems(problems)
    return found


def account(about: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """What to say of a file that was written."""
    counts = list(about["tokens"].values())
    kept = ("kind", "part", "base", "sources", "samples", "batches", "dtype")
    return {
        "out": os.fspath(out),
        **{key: about[key] for key in kept},
        "modules": len(counts),
        "tokens": {"fewest": min(counts), "most": max(counts)},
        "bytes": out.stat().st_size,
    }


def read_contents(path: Path) -> Contents:
    """A whole file, part or not.

    Raises:
        LoraforgeError: No whole file of input statistics.
    """
    file, about = open_stats(path)
    return Contents(about, {name: read_one(file, name) for name in file.shapes})


def write_contents(path: Path, contents: Contents) -> None:
    """Writes a file that appears whole or not at all, tensor by tensor.

    Raises:
        LoraforgeError: The disk refuses.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_tensors(draft, contents.tensors, {KEY: json.dumps(contents.about, sort_keys=True, ensure_ascii=False)})
            flush_file(draft)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
        flush_file(path.parent)
    except OSError as error:
        raise LoraforgeError("the statistics cannot be written", where=path, got=error.strerror or error) from error


def check_out(out: Path, *, overwrite: bool) -> None:
    """Refuses an output that is taken, or that would replace anything but input statistics.

    Raises:
        UsageError: Another suffix than .safetensors.
        LoraforgeError: It is taken, or cannot be written.
    """
    if out.suffix != SUFFIX:
        raise UsageError("the output is a .safetensors file", where="out", got=out, expected=f"NAME{SUFFIX}")
    folder = next(parent for parent in out.resolve().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise LoraforgeError("the output cannot be written there", where=out, got=f"no writable folder at {folder}")
    if not out.exists():
        return
    if not overwrite:
        hint = "choose another file, or add --overwrite"
        raise LoraforgeError("the output exists already", where=out, hint=hint)
    open_stats(out)


def match_names(wanted: Sequence[str], known: Collection[str]) -> dict[str, str]:
    """Wanted name -> known name, exactly, or with one leading prefix for all that are not there as they are."""
    there = frozenset(known)
    found = {name: name for name in wanted if name in there}
    # A checkpoint's name of a weight means its module.
    found |= {n: n.removesuffix(".weight") for n in wanted if n not in there and n.removesuffix(".weight") in there}
    absent = [name for name in wanted if name not in found]
    ends: dict[str, list[str]] = {}
    for other in there if absent else ():
        parts = other.split(".")
        for i in range(1, len(parts)):
            ends.setdefault(".".join(parts[i:]), []).append(other)
    ways: dict[tuple[str, str], dict[str, str]] = {}
    for name in absent:
        parts = name.split(".")
        for i in range(1, len(parts)):
            if (tail := ".".join(parts[i:])) in there:
                ways.setdefault(("strip", ".".join(parts[:i])), {})[name] = tail
        for other in ends.get(name, ()):
            ways.setdefault(("add", other[: -len(name) - 1]), {})[name] = other
    best = Counter({way: len(fits) for way, fits in ways.items()}).most_common(2)
    # Two prefixes that fit equally many names leave open which is meant.
    if best and (len(best) == 1 or best[0][1] > best[1][1]):
        found |= ways[best[0][0]]
    return found


def open_stats(path: Path) -> tuple[SafetensorsFile, dict[str, Any]]:
    """The file and what it says of itself.

    Raises:
        LoraforgeError: It is missing, damaged, or no file of input statistics.
    """
    if not path.is_file():
        raise LoraforgeError("there is no such file of input statistics", where=path, hint="loraforge collect-stats")
    file = SafetensorsFile(path, (torch.float64,))
    try:
        about = json.loads(file.metadata.get(KEY, ""))
        names = list(about["modules"])
        fits = about["tokens"].keys() == set(names) and len(about["part"]) == 2
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoraforgeError(
            "the file holds no input statistics",
            where=path,
            got=f"{len(file.shapes)} tensors without their description",
            expected="a file of `loraforge collect-stats`",
        ) from error
    if not fits or ("done" not in about and set(names) != file.shapes.keys()):
        raise LoraforgeError("the file's description and its tensors disagree", where=path, hint="collect them again")
    return file, about


def read_one(file: SafetensorsFile, name: str) -> Tensor:
    """The statistic of a module.

    Raises:
        LoraforgeError: It is not finite.
    """
    [value] = file.read((name,))
    if not bool(torch.isfinite(value).all()):
        raise LoraforgeError("an input statistic is not finite", where=f"{file.path}, {name}", hint="collect it again")
    return value


def _refuse_part(about: Mapping[str, Any], path: object) -> None:
    i, n = about["part"]
    if n > 1 or "done" in about:
        raise LoraforgeError(
            "the file is only a part of the statistics",
            where=path,
            got=f"part {i} of {n}" if "done" not in about else "an unfinished run",
            hint="join all parts: loraforge collect-stats --merge PART PART ... --out FILE",
        )
