"""The summary of several seeds as Markdown. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def seeds_markdown(content: Mapping[str, Any]) -> str:
    """The content of seeds.json as tables: statistics, stability, differences, tasks."""
    parts = [f"# {len(content['runs'])} runs", ""]
    for method, tasks in content["statistics"].items():
        for task, spread in tasks.items():
            seeds = [str(run["seed"]) for run in content["runs"] if _belongs(run, method, task)]
            rows = [
                [key, *(number(s[name]) for name in ("mean", "sd", "min", "max")), s["n"]] for key, s in spread.items()
            ]
            parts += [f"## {method} on {task}, seeds {', '.join(seeds)}", ""]
            parts += markdown_table(["statistic", "mean", "sd", "min", "max", "seeds"], rows)
            stable = content["stability"][method][task]
            rows = [
                [name, number(s["rho"]), number(s["kendall_w"]), chance(s["p"]), s["n"]] for name, s in stable.items()
            ]
            parts += ["Do the seeds rank the heads alike?", ""]
            parts += markdown_table(["quantity", "mean rho", "Kendall W", "p", "heads"], rows)
    if content["differences"]:
        parts += [
            "## Methods, paired by seed",
            "",
            "Larger than seed noise: the 95 % interval (Student's t) excludes 0.",
            "",
        ]
        rows = [
            [d["task"], d["key"], f"{d['a']} - {d['b']}", number(d["difference"]), number(d["noise"]), span(d["ci"]),
             {True: "yes", False: "no", None: d["reason"]}[d["larger"]]]
            for d in content["differences"]
        ]  # fmt: skip
        titles = ["task", "statistic", "methods", "difference", "sd", "95 % interval", "larger than seed noise"]
        parts += markdown_table(titles, rows)
    if content["cross_task"]:
        parts += ["## Tasks", "", "rho of the heads' means over seeds; within the band it may be chance.", ""]
        rows = [
            [c["method"], c["quantity"], f"{c['a']}, {c['b']}", number(c["rho"]), f"±{number(c['rho95'])}",
             chance(c["p_perm"]), c["n"]]
            for c in content["cross_task"]
        ]  # fmt: skip
        parts += markdown_table(["method", "quantity", "tasks", "rho", "chance (95 %)", "p", "heads"], rows)
    parts += [f"- {note}" for note in content["notes"]]
    return "\n".join(parts).rstrip() + "\n"


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of a table, with an empty line behind it."""
    lines = [list(titles), ["---"] * len(titles), *([str(cell) for cell in row] for row in rows)]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def number(value: float | None) -> str:
    """A number with three decimals; a dash where there is none."""
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{round(value, 3) + 0.0:.3f}"  # + 0.0: no minus before 0


def chance(p: float | None) -> str:
    """A p with three decimals, or as below the least of them."""
    return "<0.001" if p is not None and p < 0.001 else number(p)


def span(interval: Sequence[float] | None) -> str:
    """An interval; a dash where there is none."""
    return "-" if interval is None else f"[{number(interval[0])}, {number(interval[1])}]"


def _belongs(run: Mapping[str, Any], method: str, task: str) -> bool:
    return run["name"] == method and (run["task"] or "-") == task
