"""Whether runs can be compared: weights they started from, rows they were measured on. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from loraforge.errors import LoraforgeError, raise_problems
from loraforge.measure.analysis.runs import Run, read_object
from loraforge.measure.files import SUBSET, SUBSET_ABOUT


def same_digest(digests: Sequence[str | None]) -> bool | None:
    """Whether digests agree; None where one is not known."""
    return None if None in digests else len(set(digests)) == 1


def check_runs(runs: Sequence[Run], names: Sequence[str], other_base: bool, other_subset: bool) -> list[str]:
    """What a reader of a comparison must know of the runs.

    Args:
        runs: The runs.
        names: What they are called.
        other_base: Whether different base weights are allowed.
        other_subset: Whether different rows are allowed.

    Raises:
        LoraforgeError: Bases or rows differ and may not; both at once where both do.
    """
    warnings: list[str] = []
    problems: list[LoraforgeError] = []
    bases = {name: run.digest("base_sha256") for name, run in zip(names, runs, strict=True)}
    _judge(
        same_digest(list(bases.values())), other_base, problems, warnings,
        what="the runs started from different base weights", got=_shortened(bases),
        spoils="Urel is relative to different weights, and a head need not be the same head",
        option="--allow-different-base", unknown="no record of the base's weights: equality is not checked",
    )  # fmt: skip
    starts = {name: run.digest("theta0_sha256") for name, run in zip(names, runs, strict=True)}
    if same_digest(list(starts.values())) is False:
        warnings.append(f"the starts differ (as by the made-up head): I_pre is two measurements ({_shortened(starts)})")
    subsets = {name: _subset(run) for name, run in zip(names, runs, strict=True)}
    rows = same_digest([None if found is None else str(found["rows"]) for found in subsets.values()])
    data = same_digest([None if found is None else found["data_sha256"] for found in subsets.values()])
    sizes = ", ".join(f"{name}: {len(found['rows'])} rows" for name, found in subsets.items() if found is not None)
    _judge(
        # The document's list has no digest of the data beside it.
        rows and data is not False, other_subset, problems, warnings,
        what="the runs were measured on different rows", got=sizes,
        spoils="losses and importance of different rows are compared",
        option="--allow-different-subset", unknown="a run has no eval_subset.json: equality of the rows is not checked",
    )  # fmt: skip
    raise_problems(problems)
    for what in ("task", "seed"):
        values = [getattr(run, what) for run in runs]
        if len(set(values)) > 1:
            told = ", ".join(f"{name}: {value}" for name, value in zip(names, values, strict=True))
            warnings.append(f"the runs differ in {what} ({told})")
    return warnings


def _judge(
    same: bool | None,
    allowed: bool,
    problems: list[LoraforgeError],
    warnings: list[str],
    *,
    what: str,
    got: str,
    spoils: str,
    option: str,
    unknown: str,
) -> None:
    """A problem, a warning or nothing."""
    if same is None:
        warnings.append(unknown)
    elif not same and allowed:
        warnings.append(f"{what} ({got}): {spoils}")
    elif not same:
        problems.append(LoraforgeError(what, got=got, hint=f"{option} compares them all the same; {spoils}"))


def _subset(run: Run) -> dict[str, Any] | None:
    """The rows of a run in ascending order, and the digest of the data if it is recorded."""
    path = run.folder / SUBSET
    if not path.is_file():
        return None
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        ordered = sorted(int(row) for row in rows)
    except (ValueError, TypeError) as error:
        raise LoraforgeError(
            "the list of rows cannot be read", where=path, got=error, expected="[3, 17, ...]"
        ) from error
    return {"rows": ordered, "data_sha256": read_object(run.folder / SUBSET_ABOUT).get("data_sha256")}


def _shortened(digests: dict[str, str | None]) -> str:
    return ", ".join(f"{name}: {digest[:12] if digest else 'unknown'}" for name, digest in digests.items())
