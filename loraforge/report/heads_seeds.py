"""The report over several seeds: which numbers a seed moves, which differences are larger, what tasks share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from loraforge.report import heads_seeds_charts as charts
from loraforge.report import heads_words as words
from loraforge.report.heads_compare import STATISTICS
from loraforge.report.heads_pictures import Draw, write_pictures
from loraforge.report.heads_seeds_charts import groups_of
from loraforge.report.page import facts, page, points, section, table, text, write_page
from loraforge.report.tables import Table, present

Content = Mapping[str, Any]
ALT = {
    "seeds_statistics": "The statistics of each method and task, a mark a seed, with mean and standard deviation",
    "seeds_stability": "Mean rank correlation between seeds of importance and update, a bar a method and task",
    "seeds_tasks": "Rank correlation of importance and of update between tasks on grey bands of chance",
}


def seeds_pictures(content: Content) -> dict[str, Draw]:
    """Name -> picture, for those that there are numbers for.

    Args:
        content: As `measure.content.seeds_content` reads it.
    """
    found: dict[str, Draw] = {"seeds_statistics": partial(charts.statistics_chart, content)}
    if any(present(entry.get("rho")) for *_, found_ in groups_of(content, "stability") for entry in found_.values()):
        found["seeds_stability"] = partial(charts.stability_chart, content)
    if any(present(row.get("rho")) for row in content["cross_task"]):
        found["seeds_tasks"] = partial(charts.tasks_chart, content)
    return found


def seeds_html(content: Content) -> str:
    """The page over several seeds.

    Args:
        content: As `measure.content.seeds_content` reads it.
    """
    return _page(content, write_pictures(Path(), seeds_pictures(content), ALT, ("html",))[1])


def _page(content: Content, drawn: Mapping[str, str]) -> str:
    """The page with its pictures as inline SVG."""
    tasks = list(dict.fromkeys(str(run.get("task")) for run in content["runs"]))
    shown = {"runs": len(content["runs"]), "methods": len(content["statistics"]), "tasks": len(tasks),
             "seeds": len({run.get("seed") for run in content["runs"]})}  # fmt: skip
    alone = "One seed alone has no spread; train with others to have one."
    parts = [
        f"<h1>Heads over seeds: {escape(', '.join(tasks))}</h1>",
        text(verdict(content), "lead"),
        facts(shown),
        *(text(str(note), "warn") for note in content["notes"]),
        section("What a seed moves", text(_ABOUT_SPREAD, "note"), drawn["seeds_statistics"],
                table(spread_table(content))),
        section("Methods against seed noise", text(_ABOUT_DIFFERENCES, "note"),
                _or(difference_table(content), "Two methods on one task are needed.")),
        section("Do seeds agree on the heads?", drawn.get("seeds_stability", ""), _or(stability_table(content), alone)),
        section("Do tasks share heads?", drawn.get("seeds_tasks", ""),
                _or(tasks_table(content), "One task alone: nothing to compare.")),
        section("The runs", table(runs_table(content))),
        section("What this does not say", points(words.CAVEATS)),
    ]  # fmt: skip
    return page("Heads over seeds", parts)


def write_seeds_report(folder: str | Path, content: Content, formats: Sequence[str] = ("png", "html")) -> list[Path]:
    """Writes the pictures and report.html over several seeds; each file appears whole or not at all.

    Args:
        folder: Where to write.
        content: As `measure.content.seeds_content` reads it.
        formats: Of `heads_pictures.FORMATS`.

    Returns:
        The files, in the order written.

    Raises:
        OSError: The disk refuses.
    """
    written, drawn = write_pictures(Path(folder), seeds_pictures(content), ALT, formats)
    if "html" in formats:
        written.append(write_page(Path(folder) / "report.html", _page(content, drawn)))
    return written


def verdict(content: Content) -> str:
    """Which differences between methods are larger than what the seed moves."""
    known = [row for row in content["differences"] if row.get("larger") is not None]
    if not known:
        return "Not enough seeds of two methods to tell a difference from seed noise."
    larger = [row for row in known if row["larger"]]
    if not larger:
        return f"None of {len(known)} differences between methods is larger than what another seed moves."
    titles = [(STATISTICS.get(row["key"], row["key"]), row) for row in larger[:3]]
    named = "; ".join(f"{title} on {row['task']} ({row['a']} − {row['b']})" for title, row in titles)
    more = f" and {len(larger) - 3} more" if len(larger) > 3 else ""
    return (
        f"{len(larger)} of {len(known)} differences between methods are larger than seed noise: {named}{more}. "
        f"By chance alone about {0.05 * len(known):.1f} of them would be."
    )


def spread_table(content: Content) -> Table:
    """A row a task, statistic and method: mean, standard deviation, least, greatest."""
    rows = [
        (task, STATISTICS[key], method, _pm(found[key]),
         *(_pm({"mean": found[key].get(name)}) for name in ("min", "max")), found[key].get("n"))
        for key in STATISTICS
        for method, task, found in groups_of(content, "statistics")
        if key in found
    ]  # fmt: skip
    return Table(("task", "statistic", "method", "mean ± sd", "least", "greatest", "seeds"), tuple(rows))


def difference_table(content: Content) -> Table:
    """A row a statistic and pair of methods: the difference paired by seed against its noise."""
    rows = []
    for row in content["differences"]:
        if present(row.get("difference")):
            ends = row.get("ci") or (None, None)
            interval = f"{ends[0]:+.3f} to {ends[1]:+.3f}".replace("-", "−") if all(map(present, ends)) else None
            larger = {True: "yes", False: "no"}.get(row.get("larger"), row.get("reason"))
            title = f"{STATISTICS.get(row['key'], row['key'])}: {row['a']} − {row['b']}"
            rows.append((title, row["task"], row["difference"], row.get("noise"), interval, row.get("n"), larger))
    headers = ("difference", "task", "mean", "sd over seeds", "95 % interval", "seeds", "larger than noise")
    return Table(headers, tuple(rows))


def stability_table(content: Content) -> Table:
    """A row a method, task and column: how far seeds agree on the order of the heads."""
    rows = [
        (f"{method} on {task}", column, entry.get("rho"), entry.get("kendall_w"), entry.get("p"), entry.get("seeds"))
        for method, task, found in groups_of(content, "stability")
        for column, entry in found.items()
        if present(entry.get("rho"))
    ]
    return Table(("runs", "column", "mean ρ", "Kendall W", "p", "seeds"), tuple(rows))


def tasks_table(content: Content) -> Table:
    """A row a method and pair of tasks."""
    rows = tuple(
        (row["method"], row["quantity"], f"{row['a']} and {row['b']}", row.get("rho"), _band(row), row.get("p_perm"))
        for row in content["cross_task"]
    )
    return Table(("method", "column", "tasks", "ρ", "by chance", "p"), rows)


def runs_table(content: Content) -> Table:
    """A row a run."""
    keys = ("name", "task", "seed", "rank", "folder")
    return Table(("run", *keys[1:]), tuple(tuple(run.get(key) for key in keys) for run in content["runs"]))


def _or(data: Table, otherwise: str) -> str:
    return table(data) if data.rows else text(otherwise, "note")


def _pm(entry: Mapping[str, Any]) -> str | None:
    if not present(entry.get("mean")):
        return None
    spread = f" ± {entry['sd']:.3f}" if present(entry.get("sd")) else ""
    return f"{entry['mean']:.3f}{spread}".replace("-", "−")


def _band(row: Mapping[str, Any]) -> str | None:
    return f"±{row['rho95']:.2f}" if present(row.get("rho95")) else None


_ABOUT_SPREAD = "A mark a seed; upright bars are means, thin lines one standard deviation to each side, grey is chance."
_ABOUT_DIFFERENCES = (
    "Differences are paired by seed; noise is their standard deviation over the seeds, the interval Student's. With "
    "many statistics some intervals leave out 0 by chance."
)
