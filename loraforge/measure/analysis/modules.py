"""The attention projections of a run: what they are called, what a unit of rank costs, what their heads scored."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loraforge.errors import LoraforgeError, UsageError
from loraforge.measure.analysis.joined import join_heads
from loraforge.measure.analysis.runs import Run
from loraforge.measure.files import FINAL, INITIAL, LAYOUT, SPECTRUM
from loraforge.measure.heads.layout import PARTS, HeadLayout

# What a module can be scored by, and the column of the heads; U has one a part, energy comes from spectrum.jsonl.
COLUMNS = {"I": "I_post", "I_pre": "I_pre", "F": "F", "G": "G"}
SCORES = (*COLUMNS, "U", "energy")


@dataclass(frozen=True, slots=True)
class Module:
    """One projection; where q, k and v are fused, all of them.

    Attributes:
        name: Dotted name in the model.
        suffix: The end of it that no other projection has; from the number of its layer on, or longer.
        parts: `q`, `k`, `v`, `o`; `qkv` where fused.
        layer: Number within its stack.
        shape: (out, in), or (in, out): the cost of a rank is their sum.
        score: Of its heads.
    """

    name: str
    suffix: str
    parts: str
    layer: int
    shape: tuple[int, int]
    score: float

    @property
    def cost(self) -> int:
        """Parameters of one unit of rank."""
        return sum(self.shape)


def read_modules(run: Run, by: str, *, parts: str = "qkvo", base: str | Path | None = None) -> list[Module]:
    """The projections of a run with their scores, in the layout's order.

    A projection's score is the sum over its heads of I, I_pre, F or G (a head that harms counts nothing; the parts of
    an attention share its heads, hence its score), of the part's own U, or the rank that holds 90 % of the update's
    energy (`energy`; projections without a spectrum are left out).

    Args:
        run: Has layout.json and the measurements.
        by: One of `SCORES`.
        parts: Which of q, k, v and o.
        base: Model for the shapes; default the run's own base, ckpt_init or ckpt_final.

    Raises:
        LoraforgeError: A file, a column or a shape is missing.
        UsageError: An unknown score or part.
    """
    if by not in SCORES:
        raise UsageError("unknown score", got=by, expected=", ".join(SCORES))
    if not parts or set(parts) - set(PARTS):
        raise UsageError("unknown part", got=parts, expected="letters of qkvo")
    layout = _layout(run)
    named: dict[str, tuple[str, int]] = {}
    for attention in layout.attentions:
        for part in PARTS:
            place = attention.part(part)
            # An adapter's layout names no output projection where the adapter has none.
            if place is not None and place.module:
                before, _ = named.get(place.module, ("", 0))
                named[place.module] = (before + part, attention.layer)
    chosen = {name: about for name, about in named.items() if set(about[0]) & set(parts)}
    scores = _energies(run) if by == "energy" else _sums(run, layout, by)
    if by == "energy":
        chosen = {name: about for name, about in chosen.items() if name in scores}
    if not chosen:
        got = ", ".join(list(named)[:4]) or "no projection"
        raise LoraforgeError("no projection is left to suggest anything for", where=run.folder, got=got)
    suffixes = unique_suffixes(chosen, named)
    shapes = _shapes(run, suffixes, base)
    return [
        Module(name, suffixes[name], held, layer, shapes[name], scores[name]) for name, (held, layer) in chosen.items()
    ]


def unique_suffixes(names: Iterable[str], among: Iterable[str] = ()) -> dict[str, str]:
    """For each name the end that no other has: from before its first number on, longer where that is not enough.

    Args:
        names: Dotted names.
        among: More names that an end must not belong to.
    """
    names = list(names)
    every = {*names, *among}
    found = {}
    for name in names:
        words = name.split(".")
        start = max(next((i for i, word in enumerate(words) if word.isdigit()), 0) - 1, 0)
        while start and any(ends_with(other, ".".join(words[start:])) for other in every - {name}):
            start -= 1
        found[name] = ".".join(words[start:])
    return found


def ends_with(name: str, suffix: str) -> bool:
    """Whether a dotted name is the suffix or ends with it, at a dot."""
    return name == suffix or name.endswith(f".{suffix}")


def _layout(run: Run) -> HeadLayout:
    path = run.folder / LAYOUT
    try:
        return HeadLayout.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoraforgeError(
            "the layout of the heads cannot be read", where=path, got=error, hint="loraforge measure run writes it"
        ) from error


def _sums(run: Run, layout: HeadLayout, by: str) -> dict[str, float]:
    """Module -> sum over its heads."""
    heads = join_heads(run.folder)
    wanted = [COLUMNS[by]] if by in COLUMNS else [f"U{part}" for part in PARTS]
    if not any(heads.has(name) for name in wanted):
        raise LoraforgeError(f"no head has a value of {wanted[0]}", where=run.folder, hint="loraforge measure run")
    at = {key: i for i, key in enumerate(heads.keys)}
    sums: dict[str, float] = {}
    for attention, start in zip(layout.attentions, layout.starts, strict=True):
        places = [at[key] for key in layout.heads[start : start + attention.n_q] if key in at]
        for part in PARTS:
            place = attention.part(part)
            if place is None:
                continue
            values = heads.columns[COLUMNS.get(by, f"U{part}")][places]
            total = float(np.maximum(values[np.isfinite(values)], 0).sum())
            # Of a fused module each part's own update counts, but its heads only once.
            sums[place.module] = sums.get(place.module, 0.0) + total if by == "U" else total
    return sums


def _energies(run: Run) -> dict[str, float]:
    """Module -> rank90 of spectrum.jsonl."""
    path = run.folder / SPECTRUM
    try:
        lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines() if text.strip()]
        return {line["module"]: float(line["rank90"]) for line in lines if line["rank90"] is not None}
    except (OSError, ValueError, KeyError, TypeError) as error:
        hint = "loraforge measure spectrum writes it"
        raise LoraforgeError("the spectra cannot be read", where=path, got=_why(error), hint=hint) from error


def _why(error: Exception) -> object:
    return (error.strerror if isinstance(error, OSError) else None) or error


def _shapes(run: Run, suffixes: Mapping[str, str], base: str | Path | None) -> dict[str, tuple[int, int]]:
    """Module -> the two sides of its weight, from the headers of a model or of the run's adapter."""
    recorded = run.config.get("base")
    places = [base] if base is not None else [recorded, run.folder / INITIAL, run.folder / FINAL]
    found: dict[str, tuple[int, int]] = {}
    for place in places:
        if place is None or (place is not base and not Path(place).exists() and place is not recorded):
            continue
        try:
            known = _headers(Path(place) if Path(place).exists() else place)
        except LoraforgeError:
            if place is base:
                raise
            continue
        for name, suffix in suffixes.items():
            # A model saved without its head has shorter names, one inside another longer ones.
            fits = [other for other in known if ends_with(other, suffix) or ends_with(name, other)]
            if name not in found and fits:
                found[name] = known[name if name in known else fits[0]]
        if len(found) == len(suffixes):
            return found
    missing = [name for name in suffixes if name not in found]
    raise LoraforgeError(
        "the shapes of projections are not known", where=run.folder,
        got=", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else ""),
        hint="--base MODEL names the model that was fine-tuned",
    )  # fmt: skip


def _headers(place: str | Path) -> dict[str, tuple[int, int]]:
    """Module -> the two sides of its weight; nothing but headers is read."""
    from loraforge.checkpoints import open_checkpoint

    if (Path(place) / "adapter_config.json").is_file():
        from loraforge.adapters import open_adapter

        adapter = open_adapter(place)
        return {name: (adapter.info(name).m, adapter.info(name).n) for name in adapter.modules}
    checkpoint = open_checkpoint(place)
    shapes = {n.removesuffix(".weight"): checkpoint.shape(n) for n in checkpoint.names if n.endswith(".weight")}
    return {name: (shape[0], math.prod(shape[1:])) for name, shape in shapes.items() if len(shape) == 2}
