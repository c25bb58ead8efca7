"""Pictures and report of a folder from its files, be it a run, a comparison or several seeds. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loraforge.errors import LoraforgeError
from loraforge.measure.analysis.content import METRICS, SEEDS, compare_content, run_content, seeds_content
from loraforge.measure.files import HEADS, IMPORTANCE, STATS
from loraforge.report.heads import write_run_report
from loraforge.report.heads_compare import write_compare_report
from loraforge.report.heads_pictures import FORMATS
from loraforge.report.heads_seeds import write_seeds_report

__all__ = ["FORMATS", "draw"]


def draw(
    folder: str | Path, *, out: str | Path | None = None, formats: Sequence[str] = ("png", "html")
) -> tuple[str, list[Path]]:
    """Writes pictures and report of a folder that holds a run, a comparison or a summary over seeds.

    Args:
        folder: What to draw.
        out: Where to write; default the same folder.
        formats: Of FORMATS.

    Returns:
        ("run", "comparison" or "seeds", the files written).

    Raises:
        LoraforgeError: The folder holds none of them, or lacks files; all missing ones are named.
    """
    place = Path(folder)
    target = place if out is None else Path(out)
    if (place / METRICS).is_file():
        return "comparison", write_compare_report(target, compare_content(place), formats)
    if (place / SEEDS).is_file():
        return "seeds", write_seeds_report(target, seeds_content(place), formats)
    if any((place / name).is_file() for name in (HEADS, STATS, *IMPORTANCE.values())):
        return "run", write_run_report(target, run_content(place), formats)
    got = "none of these files" if place.is_dir() else "no such folder"
    raise LoraforgeError(
        "there is nothing to draw", where=place, got=got,
        expected=f"{HEADS} of a run, {METRICS} of a comparison, or {SEEDS}",
        hint="loraforge measure run RUN makes them",
    )  # fmt: skip
