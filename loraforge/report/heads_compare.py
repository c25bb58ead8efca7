"""The report of several runs on the same heads, side by side: numbers in, one offline page and pictures out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from loraforge.report import heads_compare_charts as charts
from loraforge.report import heads_words as words
from loraforge.report.heads_axes import head_name, is_plain, signed
from loraforge.report.heads_charts import head_key, known
from loraforge.report.heads_pictures import Draw, write_pictures
from loraforge.report.heads_spectra_charts import has_ranks, ranks_chart
from loraforge.report.page import code, facts, fold, page, points, section, table, text, write_page
from loraforge.report.sortable import SCRIPT, STYLE, sortable
from loraforge.report.tables import Table, present

Content = Mapping[str, Any]
ALT = {
    "compare_I_vs_U": "Scatter plots of importance before training against relative update, a panel a run, same axes",
    "compare_stats": "Bars of correlations, overlaps and numbers of cases run by run on grey bands of chance",
    "compare_update_dist": "Histograms of the update over the heads, the same bins for every run",
    "compare_headwise": "Scatter plots of the same head in two runs, with the line of no difference",
    "compare_ranks": "Effective rank of the update by layer, a panel a projection, a line a run",
}
# Statistic -> how it is called; in the order of the table.
STATISTICS = {
    "spearman_rho_Ipre_U": "ρ(I_pre, U)",
    "spearman_rho_Ipre_Urel": "ρ(I_pre, Urel)",
    **{f"spearman_rho_Ipost_{name}": f"ρ(I_post, {name})" for name in ("U", "Urel", "G", "F", "Ppred")},
    "topk_overlap_Ipre_U": "top overlap of I_pre and U",
    "topk_overlap_Ipre_Urel": "top overlap of I_pre and Urel",
    "topk_overlap_Ipre_Ipost": "top overlap of I_pre and I_post",
    "n_important_but_static": "important but static",
    "n_plastic_but_unimportant": "plastic but unimportant",
}


def compare_pictures(content: Content) -> dict[str, Draw]:
    """Name -> picture, for those that the comparison has numbers for.

    Args:
        content: As `measure.content.compare_content` reads it.
    """
    found: dict[str, Draw] = {
        "compare_I_vs_U": partial(charts.panels_chart, content),
        "compare_stats": partial(charts.stats_chart, content),
        "compare_update_dist": partial(charts.update_chart, content),
        "compare_headwise": partial(charts.headwise_chart, content),
    }
    return found | {"compare_ranks": partial(ranks_chart, content)} if has_ranks(content) else found


def compare_html(content: Content) -> str:
    """The page of a comparison.

    Args:
        content: As `measure.content.compare_content` reads it.
    """
    return _page(content, write_pictures(Path(), compare_pictures(content), ALT, ("html",))[1])


def _page(content: Content, drawn: Mapping[str, str]) -> str:
    """The page with its pictures as inline SVG."""
    names = content["names"]
    parts = [
        STYLE,
        f"<h1>{escape(' against '.join(names) if len(names) < 3 else ', '.join(names))}</h1>",
        text(content["findings"][0] if content["findings"] else "The same heads in several runs.", "lead"),
        _facts(content),
        points(content["findings"][1:] or [f"{name}: {words.verdict(content['runs'][name])}" for name in names]),
        *(text(str(note), "warn") for note in content["warnings"]),
        section("The statistics, run by run", drawn["compare_stats"], table(statistics_table(content)),
                _differences(content)),
        section("Heads that matter, heads that move", drawn["compare_I_vs_U"]),
        section("How the update is spread", drawn["compare_update_dist"], table(spread_table(content))),
        section("The same head in both", drawn["compare_headwise"], *_between(content)),
        section("Ranks of the update", *_ranks(content, drawn)),
        section("All heads", sortable(heads_table(content), "heads")),
        section("What this does not say", points([*_CAVEATS, *words.CAVEATS])),
        _repeat(content),
        SCRIPT,
    ]  # fmt: skip
    return page(f"{', '.join(names)}: heads", parts)


def write_compare_report(
    folder: str | Path, content: Content, formats: Sequence[str] = ("png", "html")
) -> list[Path]:  # fmt: skip
    """Writes the pictures and report.html of a comparison; each file appears whole or not at all.

    Args:
        folder: Where to write.
        content: As `measure.content.compare_content` reads it.
        formats: Of `heads_pictures.FORMATS`.

    Returns:
        The files, in the order written.

    Raises:
        OSError: The disk refuses.
    """
    written, drawn = write_pictures(Path(folder), compare_pictures(content), ALT, formats)
    if "html" in formats:
        written.append(write_page(Path(folder) / "report.html", _page(content, drawn)))
    return written


def statistics_table(content: Content) -> Table:
    """A row a statistic, a column a run, and what chance gives."""
    runs = [content["runs"][name] for name in content["names"]]
    rows = []
    for key, title in STATISTICS.items():
        values = [run["stats"].get(key) for run in runs]
        if any(present(value) for value in values):
            form = "+.3f" if "rho" in key else ".2f" if "overlap" in key else ".0f"
            shown = [f"{value:{form}}".replace("-", "−") if present(value) else None for value in values]
            rows.append((title, *shown, _chance(runs[0], key)))
    return Table(("statistic", *content["names"], "95 % by chance"), tuple(rows))


def _chance(run: Content, key: str) -> str | None:
    null = run["null"]
    if "rho" in key:
        return f"±{null['rho95']:.2f}" if present(null.get("rho95")) else None
    chance = null["cases"].get(key.removeprefix("n_")) or {}
    counted = key.startswith("n_")
    low, high = (chance.get(end) if counted else null.get(f"overlap_{end}") for end in ("lo", "hi"))
    digits = 0 if counted else 2
    return f"{low:.{digits}f} to {high:.{digits}f}" if present(low) and present(high) else None


def difference_table(content: Content) -> Table:
    """A row a statistic and pair of runs: the difference with its interval over resampled heads."""
    rows = []
    for pair in content["comparison"].get("pairs") or ():
        for key, delta in pair["deltas"].items():
            if not present(delta.get("difference")):
                continue
            ends = delta.get("ci") or (None, None)
            interval = f"{ends[0]:+.2f} to {ends[1]:+.2f}".replace("-", "−") if all(map(present, ends)) else None
            beyond = {True: "yes", False: "no"}.get(delta.get("beyond_chance"))
            difference = signed(delta["difference"], "+.0f" if key.startswith("n_") else "+.3f")
            rows.append((f"{STATISTICS.get(key, key)}: {pair['a']} − {pair['b']}", difference, interval, beyond))
    return Table(("difference", "value", "95 % interval", "beyond chance"), tuple(rows))


def spread_table(content: Content) -> Table:
    """Median, tenth and ninetieth percentile of the updates of each run."""
    rows = []
    for name in content["names"]:
        for column in ("Urel", "Urel_l2", "U"):
            values = sorted(row[column] for row in known(content["runs"][name]["heads"], column))
            if values:
                rows.append((name, column, *(values[round(q * (len(values) - 1))] for q in (0.1, 0.5, 0.9))))
    return Table(("run", "update", "10 %", "median", "90 %"), tuple(rows))


def heads_table(content: Content) -> Table:
    """A row a head with importance after training and update in every run."""
    names, columns = content["names"], ("I_pre", "I_post", "Urel")
    tables = {name: {head_key(row): row for row in content["runs"][name]["heads"]} for name in names}
    keys = list(dict.fromkeys(key for found in tables.values() for key in found))
    wanted = [(c, n) for c in columns for n in names if any(present(row.get(c)) for row in tables[n].values())]
    rows = []
    plain = is_plain([row for found in tables.values() for row in found.values()])
    for key in keys:
        first = next(found[key] for found in tables.values() if key in found)
        rows.append((head_name(first, plain), *(tables[name].get(key, {}).get(column) for column, name in wanted)))
    return Table(("head", *(f"{column} {name}" for column, name in wanted)), tuple(rows))


def _facts(content: Content) -> str:
    first = content["runs"][content["names"][0]]
    shown = {
        "runs": len(content["names"]),
        "heads": len(first["heads"]),
        "task": first.get("task"),
        "seed": first.get("seed"),
    }
    same = {True: "yes", False: "no"}
    for title, key in (("same base", "same_base"), ("same start", "same_start")):
        shown[title] = same.get(content["comparison"].get(key))
    return facts({name: value for name, value in shown.items() if value is not None})


def _differences(content: Content) -> str:
    found = difference_table(content)
    if not found.rows:
        return text("The differences between the runs have no intervals in these files.", "note")
    return "<h3>Differences</h3>" + text(_ABOUT_DIFFERENCES, "note") + table(found)


def _between(content: Content) -> list[str]:
    """Agreement of the runs head by head."""
    rows, told = [], []
    for pair in content["comparison"].get("pairs") or ():
        for column, entry in (pair.get("between") or {}).items():
            if present(entry.get("rho")):
                ends = entry.get("ci") or (None, None)
                interval = f"{ends[0]:+.2f} to {ends[1]:+.2f}".replace("-", "−") if all(map(present, ends)) else None
                rows.append((f"{pair['a']} and {pair['b']}", column, f"{entry['rho']:+.3f}".replace("-", "−"), interval,
                             f"±{entry['rho95']:.2f}" if present(entry.get("rho95")) else None))  # fmt: skip
        changed = pair.get("sign_changes") or {}
        if changed.get("n"):
            told.append(
                f"After training {changed['n']} heads help in one of {pair['a']} and {pair['b']}, harm in the other; "
                f"of {changed.get('both_significant') or 0} both intervals leave out 0."
            )
    if content["comparison"].get("same_start"):
        told.append("Before training the runs are the same model, so importance there is one measurement for all.")
    agreement = table(Table(("runs", "column", "ρ", "95 % interval", "by chance"), tuple(rows))) if rows else ""
    return [agreement, points(told) if told else ""]


def _ranks(content: Content, drawn: Mapping[str, str]) -> list[str]:
    if "compare_ranks" not in drawn:
        return [text("Spectra of at least two runs are needed: loraforge measure spectrum.", "note"),
                *(text(told, "note") for told in content["missing"].values())]  # fmt: skip
    return [text("Dotted: the rank that LoRA was given. A LoRA line at its ceiling has used up its rank.", "note"),
            drawn["compare_ranks"]]  # fmt: skip


def _repeat(content: Content) -> str:
    comparison = content["comparison"]
    folders = " ".join(str(path) for path in (comparison.get("folders") or {}).values())
    digests = (comparison.get("hashes") or {}).items()
    hashes = {f"{name} {key}": str(value) for name, found in digests for key, value in found.items() if value}
    return section(
        "How to repeat it",
        code(f"loraforge compare {folders or 'RUN RUN'} --out DIR"),
        fold("Hashes", code(words.hash_lines(hashes))) if hashes else "",
        fold("Summary as text", code(content["summary"])) if content["summary"] else "",
    )


_ABOUT_DIFFERENCES = (
    "Intervals come from resampling the heads, the same heads in both runs. They say how sure the difference is for "
    "these two trainings; only several seeds say whether another training would show it."
)
_CAVEATS = (
    "One training of each method: a difference may come from the seed as well as from the method.",
    "LoRA's update has rank r at most, full fine-tuning's does not: equal norms are not equal changes.",
)
