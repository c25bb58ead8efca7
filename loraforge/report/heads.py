"""The report of one run's heads: numbers in, one offline HTML page and the document's pictures out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from loraforge.report import heads_tables as tables
from loraforge.report import heads_words as words
from loraforge.report.heads_axes import CASES
from loraforge.report.heads_pictures import ALT, pictures, write_pictures
from loraforge.report.page import code, facts, fold, page, points, section, table, text, write_page
from loraforge.report.sortable import SCRIPT, STYLE, sortable
from loraforge.report.tables import Table, present

Content = Mapping[str, Any]
_HEATMAPS = {
    "fig_heatmap_I_pre": "Importance before training",
    "fig_heatmap_I_post": "Importance after training",
    "fig_heatmap_U": "Relative update",
    "fig_heatmap_G": "Gradient on the gate",
}


def run_html(content: Content) -> str:
    """The page of one run.

    Args:
        content: As `measure.content.run_content` reads it.
    """
    return _page(content, write_pictures(Path(), pictures(content), ALT, ("html",))[1])


def _page(content: Content, drawn: Mapping[str, str]) -> str:
    """The page with its pictures as inline SVG."""
    parts = [
        STYLE,
        f"<h1>{escape(str(content['name']))}</h1>",
        text(words.verdict(content), "lead"),
        _facts(content),
        points(words.findings(content)),
        *(text(note, "warn") for note in words.warnings(content)),
        section("The statistics", drawn["fig_stats"], table(tables.statistics_table(content)), _MEANINGS),
        _shown("Heads that matter, heads that move", _ABOUT_SCATTER, [drawn.get("fig_I_vs_U")]),
        section("The cases", *_cases(content)),
        section("Where in the model", *_heatmaps(drawn), *_groups(content)),
        _shown("Before and after training", "", [drawn.get("fig_Ipre_vs_Ipost"), drawn.get("fig_Ipost_corrs")],
               words.gone(content, "importance_post.jsonl")),
        _shown("What the gradient foretells", _ABOUT_GRADIENT, [drawn.get("fig_I_vs_G"), drawn.get("fig_U_vs_Ppred")],
               words.gone(content, "gradfisher_pre.jsonl")),
        _shown("Importance in tenths", _ABOUT_BUCKETS, [drawn.get("fig_bucket_orthogonality")]),
        _shown("Which projections moved", "", [drawn.get("fig_components"), _table(tables.components_table(content))]),
        _shown("Spectra of the update", _ABOUT_SPECTRA,
               [drawn.get("fig_spectrum"), _table(tables.intruders_table(content))],
               words.gone(content, "spectrum.jsonl")),
        _shown("Along the training", "", [drawn.get("fig_path")], words.gone(content, "path.json")),
        section("All heads", sortable(tables.heads_table(content), "heads")),
        section("What this does not say", points(words.CAVEATS)),
        _repeat(content),
        SCRIPT,
    ]  # fmt: skip
    return page(f"{content['name']}: heads", parts)


def write_run_report(folder: str | Path, content: Content, formats: Sequence[str] = ("png", "html")) -> list[Path]:
    """Writes the pictures and report.html of a run into a folder; each file appears whole or not at all.

    Args:
        folder: Where to write.
        content: As `measure.content.run_content` reads it.
        formats: Of FORMATS.

    Returns:
        The files, in the order written.

    Raises:
        OSError: The disk refuses.
    """
    written, drawn = write_pictures(Path(folder), pictures(content), ALT, formats)
    if "html" in formats:
        written.append(write_page(Path(folder) / "report.html", _page(content, drawn)))
    return written


def _facts(content: Content) -> str:
    pre = content["importance"].get("pre") or {}
    shown = {"method": content["method"], "task": content["task"], "seed": content["seed"], "rank": content["rank"],
             "heads": len(content["heads"]), "rows measured": (pre.get("subject") or {}).get("n")}  # fmt: skip
    return facts({name: value for name, value in shown.items() if value is not None})


def _shown(title: str, about: str, shown: Sequence[str | None], gone: Sequence[str] = ()) -> str:
    """A section of pictures and tables; what is missing is said instead. Empty without either."""
    there = [part for part in shown if part]
    first = [text(about, "note")] if about and there else []
    parts = [*first, *there, *(text(sentence, "note") for sentence in gone)]
    return section(title, *parts) if parts else ""


def _table(data: Table) -> str:
    return table(data) if data.rows else ""


def _heatmaps(drawn: Mapping[str, str]) -> list[str]:
    return [part for name, title in _HEATMAPS.items() if name in drawn for part in (f"<h3>{title}</h3>", drawn[name])]


def _cases(content: Content) -> list[str]:
    limits = content["cases"].get("thresholds") or {}
    known = {tuple(name.rsplit("_p", 1)): value for name, value in limits.items() if present(value)}
    told = [f"percentile {rank} of {name} is {value:.3g}".replace("-", "−") for (name, rank), value in known.items()]
    parts = []
    for name, (_, label) in CASES.items():
        found = tables.case_table(content, name)
        parts += [f"<h3>{label.capitalize()}</h3>", table(found) if found.rows else text("None.", "note")]
    return [*parts, text(f"Thresholds: {'; '.join(told)}.", "note") if told else ""]


def _groups(content: Content) -> list[str]:
    found = tables.groups_table(content)
    return ["<h3>Attention by attention</h3>", table(found)] if found.rows else []


def _repeat(content: Content) -> str:
    command = content.get("command") or (f"loraforge plot {content['folder']}" if content.get("folder") else "")
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    settings = words.settings_lines({**content["config"], **{k: v for k, v in content["importance"].items() if v}})
    parts = [
        code(str(command)) if command else "",
        text(f"Run with {versions}.") if versions else "",
        fold("Hashes of what was measured", code(words.hash_lines(content["hashes"]))) if content["hashes"] else "",
        fold("All settings", code(settings)) if settings else "",
        *(text(told, "note") for told in words.gone(content, "run_config.json")),
    ]
    return section("How to repeat it", *parts)


_MEANINGS = fold("What these mean", points([
    "ρ: Spearman's rank correlation over the heads; 1 means the same order, −1 the opposite.",
    "By chance: 95 % of the correlations of independent columns are closer to 0 than this.",
    "p: share of random pairings with a correlation at least as strong, both signs.",
    "ρ within layers: ranks are taken inside each layer, so that depth alone cannot make a correlation.",
]))  # fmt: skip
_ABOUT_SCATTER = (
    "A point a head; thin lines are 95 % intervals of importance. Triangles: important but static. Squares: plastic "
    "but unimportant. Grey: the corners that the thresholds cut off."
)
_ABOUT_GRADIENT = (
    "G is the mean size of the loss's gradient on a head's gate, Ppred = G² / F is near 1 where that gradient has the "
    "same size on every row. Both are known before training."
)
_ABOUT_BUCKETS = (
    "Each head is in exactly one tenth; dots are heads, bars are medians, the dotted line is the median of all."
)
_ABOUT_SPECTRA = (
    "Effective rank is exp of the entropy of the singular values. For LoRA its ceiling is r: near the ceiling the rank "
    "is used up, far below it part of it lies idle."
)
