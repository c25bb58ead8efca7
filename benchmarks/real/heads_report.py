"""Markdown of the results of `heads.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MARK = "heads-table"
# Key of stats.json -> how the table calls it.
SHOWN = {
    "spearman_rho_Ipre_Urel": "rho(I before, relative U)",
    "spearman_rho_Ipost_Urel": "rho(I after, relative U)",
    "spearman_rho_Ipost_U": "rho(I after, U)",
    "spearman_rho_Ipost_G": "rho(I after, G before)",
    "topk_overlap_Ipre_U": "top-20 overlap (I before, U)",
    "n_important_but_static": "important but static",
    "n_plastic_but_unimportant": "plastic but unimportant",
}
BETWEEN = {"U": "U", "Urel": "relative U", "I_post": "I after"}


def spread(values: Sequence[float | None], digits: int = 2) -> str:
    """The values of the seeds, one after the other."""
    return ", ".join("-" if value is None else f"{value:.{digits}f}" for value in values)


def by_run(results: dict[str, Any], task: str, method: str) -> list[dict[str, Any]]:
    """Runs of a task and method, in the order of the seeds."""
    start = f"{method}/{task}/"
    return [run for name, run in results["runs"].items() if name.startswith(start)]


def within_table(results: dict[str, Any]) -> list[str]:
    """What each run says of its heads: a line a statistic, the seeds beside each other."""
    columns = [(task, method) for task in results["tasks"] for method in ("FFT", "LoRA")]
    lines = [
        f"| | {' | '.join(f'{task}, {method}' for task, method in columns)} | by chance |",
        f"|---|{'---|' * (len(columns) + 1)}",
    ]
    accuracy = [spread([100 * run["accuracy"] for run in by_run(results, *column)], 1) for column in columns]
    lines.append(f"| accuracy on 1024 rows, % | {' | '.join(accuracy)} | |")
    for key, title in SHOWN.items():
        counts = key.startswith("n_")
        cells = [
            spread([run["stats"][key] for run in by_run(results, *column)], 0 if counts else 2) for column in columns
        ]
        lines.append(f"| {title} | {' | '.join(cells)} | {chance(results, key)} |")
    net = [spread([(run["path"] or {}).get("total", {}).get("net_over_path") for run in by_run(results, *column)])
           for column in columns]  # fmt: skip
    lines.append(f"| net over path length of the update | {' | '.join(net)} | |")
    use = [spread([(run["spectrum"] or {}).get("rank_use") for run in by_run(results, *column)]) for column in columns]
    return [*lines, f"| effective rank over r | {' | '.join(use)} | |"]


def chance(results: dict[str, Any], key: str) -> str:
    """The chance level of a statistic, the same for all runs."""
    null = next(iter(results["runs"].values()))["stats"]["null"]
    if key.startswith("spearman"):
        return f"within {null['rho95']:.2f} of 0"
    if key.startswith("topk"):
        low, high = null["overlap_range95"]
        return f"{null['overlap_expected']:.2f} ({low:.2f} to {high:.2f})"
    case = null["cases_expected"][key.removeprefix("n_")]
    low, high = case["range95"]
    return f"{case['expected']:.1f} ({low} to {high})"


def between_table(results: dict[str, Any]) -> list[str]:
    """Whether the two methods, and two seeds of one method, agree on the heads."""
    tasks = results["tasks"]
    lines = [f"| rank correlation over heads | {' | '.join(tasks)} |", f"|---|{'---|' * len(tasks)}"]
    for key, title in BETWEEN.items():
        cells = []
        for task in tasks:
            pairs = [pair[0] for name, pair in results["pairs"].items() if name.startswith(f"{task} ")]
            told = [pair["between"][key] for pair in pairs]
            cells.append(
                "; ".join(f"{found['rho']:.2f} ({found['ci'][0]:.2f} to {found['ci'][1]:.2f})" for found in told)
            )
        lines.append(f"| {title}: FFT with LoRA, each seed | {' | '.join(cells)} |")
    stability = results["summary"]["stability"]
    for method in ("FFT", f"LoRA-r{results['lora']['r']}"):
        for key, title in BETWEEN.items():
            cells = [f"{stability[method][task][key]['rho']:.2f}" for task in tasks]
            lines.append(f"| {title}: seed with seed, {method} | {' | '.join(cells)} |")
    return lines


def probe_table(results: dict[str, Any]) -> list[str]:
    """Importance before training, with a random and with a trained head."""
    tasks, found = results["tasks"], results["probe"]
    lines = [f"| importance before training | {' | '.join(tasks)} |", f"|---|{'---|' * len(tasks)}"]
    rows = {
        "random_post": "random head: rho with I after (FFT)",
        "probe_post": "trained head: rho with I after (FFT)",
        "random_probe": "random with trained head",
    }
    for key, title in rows.items():
        cells = [spread([value[key] for name, value in found.items() if name.startswith(f"{task} ")]) for task in tasks]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    for name in ("random", "probe"):
        title = "random heads of two seeds" if name == "random" else "trained heads of two seeds"
        cells = [spread([found["between seeds"][f"{task} {name}"]]) for task in tasks]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def heading(results: dict[str, Any]) -> str:
    """Where and on what the figures were measured."""
    heads = next(iter(results["runs"].values()))["stats"]["n_heads"]
    seeds = results["seeds"]
    measured = ", ".join(sorted({run["commit"][:12] for run in results["runs"].values()}))
    return (
        f"{results['machine']}, torch {results['torch']}, transformers {results['transformers']}; measured with commit "
        f"{measured}, compared with {results['commit']}, {results['date']}. {heads} heads, {results['rows']} "
        f"rows measured, seeds {', '.join(map(str, seeds))} in this order."
    )


def table(results: dict[str, Any]) -> str:
    """Markdown of all that there is, each table between markers."""
    makers = {"within": within_table, "between": between_table, "probe": probe_table}
    parts = [heading(results)]
    for key, maker in makers.items():
        parts.append("\n".join([f"<!-- {MARK}-{key}:begin -->", *maker(results), f"<!-- {MARK}-{key}:end -->"]))
    return "\n\n".join(parts)
