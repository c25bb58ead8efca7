"""The HTML report of one fine-tuning run: loss, learning rate and metrics by step, and what came out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraforge.report.page import facts, fold, page, section, table, text, write_page
from loraforge.report.plots import COLOURS, INK, figure, svg
from loraforge.report.tables import Table, format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Log = Sequence[Mapping[str, Any]]
# More points than this are drawn without a mark each.
_MARKED = 40


def training_report_html(record: Mapping[str, Any], log: Log) -> str:
    """The report as a self-contained page.

    Args:
        record: The content of run.json.
        log: The lines of train_log.jsonl: step, loss, learning_rate, grad_norm, eval_loss, eval_METRIC.
    """
    what = "LoRA" if record["method"] == "lora" else "Full fine-tuning"
    title = f"{what} on {record['task']['id']}"
    parts = [
        f"<h1>{text(title)[3:-4]}</h1>",
        text("Every number on this page comes from the run itself; none was typed in.", "lead"),
        facts(_summary(record)),
        _measured(record),
        section("Loss", svg(partial(loss_chart, log), "loss by step")) if series(log, "loss") else "",
        _metrics(record, log),
        section("Learning rate and gradient", svg(partial(rate_chart, log), "learning rate and gradient norm by step"))
        if series(log, "learning_rate")
        else "",
        section("What went in", table(_data(record)), fold("Settings", table(_settings(record)))),
    ]
    return page(title, parts)


def write_training_report(path: Path, record: Mapping[str, Any], log: Log) -> Path:
    """Writes `training_report_html` to a file that appears whole or not at all."""
    return write_page(Path(path), training_report_html(record, log))


def series(log: Log, key: str) -> list[tuple[int, float]]:
    """(step, value) of the lines that have a finite number under a key."""
    found = [(int(line["step"]), line.get(key)) for line in log]
    return [(step, float(value)) for step, value in found if isinstance(value, int | float) and math.isfinite(value)]


@contextmanager
def loss_chart(log: Log) -> Iterator[Figure]:
    """Training loss (mean since the last line) and loss on the eval rows."""
    with figure(3.8) as (drawn, axes):
        _line(axes, series(log, "loss"), COLOURS[0], "training")
        _line(axes, series(log, "eval_loss"), COLOURS[1], "eval rows")
        axes.set(xlabel="step", ylabel="cross-entropy")
        axes.set_ylim(bottom=0)
        axes.grid()
        drawn.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
        yield drawn


@contextmanager
def metric_chart(log: Log, names: Sequence[str], best: int | None) -> Iterator[Figure]:
    """Metrics on the eval rows; a line marks the step whose weights were taken."""
    with figure(3.6) as (drawn, axes):
        for i, name in enumerate(names):
            _line(axes, series(log, f"eval_{name}"), COLOURS[(i + 2) % len(COLOURS)], name)
        if best is not None:
            axes.axvline(best, color=INK, linewidth=1.2, linestyle="--", label="taken")
        axes.set(xlabel="step", ylabel="on the eval rows")
        axes.grid()
        drawn.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
        yield drawn


@contextmanager
def rate_chart(log: Log) -> Iterator[Figure]:
    """Learning rate, and the norm of the gradient before it was clipped."""
    with figure(3.2, columns=2) as (drawn, both):
        for axes, key, colour in zip(both, ("learning_rate", "grad_norm"), (COLOURS[0], COLOURS[5]), strict=True):
            _line(axes, series(log, key), colour, key)
            axes.set_title(key.replace("_", " "))
            axes.set(xlabel="step")
            axes.set_ylim(bottom=0)
            axes.grid()
        yield drawn


def _line(axes: Any, points: Sequence[tuple[int, float]], colour: str, label: str) -> None:
    axes.xaxis.get_major_locator().set_params(integer=True)  # there is no half a step
    if points:
        marker = "o" if len(points) <= _MARKED else None
        axes.plot(*zip(*points, strict=True), color=colour, label=label, marker=marker, markersize=4, linewidth=1.6)


def _summary(record: Mapping[str, Any]) -> dict[str, object]:
    lora = record.get("lora") or {}
    values: dict[str, object] = {
        "task": record["task"]["id"],
        "kind": record["task"]["kind"],
        "rank": lora.get("r"),
        "modules": record.get("modules"),
        "trained parameters": f"{record['trainable_parameters']:,}",
        "steps": record["steps"],
        "epochs": record["epochs"],
        "seconds": record["seconds"],
        "peak memory": format_bytes(float(record["peak_rss_bytes"])),
    }
    return {key: value for key, value in values.items() if value is not None}


def _measured(record: Mapping[str, Any]) -> str:
    rows = []
    for split, score in record["metrics"].items():
        for name, value in score["metrics"].items():
            low_high = score["intervals"].get(name)
            rows.append((split, name, value, None if low_high is None else _interval(low_high), score["n"]))
    if not rows:
        return section("Measured", text("The task has no eval or test rows, so nothing was measured.", "note"))
    caption = "Measured with the final weights. Intervals cover 95 % of what other rows of the same kind would give."
    best = record.get("best")
    told = "" if best is None else text(
        f"The weights are those of step {best['step']}, the best by {best['metric']} on the eval rows; the score on "
        "these rows is therefore a little too good, that on the test rows is not.", "note"
    )  # fmt: skip
    headers = ("split", "metric", "value", "95 % interval", "rows")
    return section("Measured", table(Table(headers, tuple(rows), caption=caption)), told)


def _interval(low_high: Sequence[float]) -> str:
    return f"{low_high[0]:.4f} to {low_high[1]:.4f}"


def _metrics(record: Mapping[str, Any], log: Log) -> str:
    keys = dict.fromkeys(key for line in log for key in line if key.startswith("eval_") and key != "eval_loss")
    names = [key.removeprefix("eval_") for key in keys if len(series(log, key)) > 1]
    if not names:
        return ""
    best = (record.get("best") or {}).get("step")
    return section("Metrics by step", svg(partial(metric_chart, log, names, best), "metrics on the eval rows by step"))


def _data(record: Mapping[str, Any]) -> Table:
    rows = tuple(
        (split, entry["source"], entry["rows"], entry["available"], str(entry["sha256"])[:16])
        for split, entry in record["data"].items()
    )
    return Table(("split", "source", "rows", "of", "sha256"), rows)


def _settings(record: Mapping[str, Any]) -> Table:
    groups = {"train": record["train"], "lora": record.get("lora") or {}}
    rows = [(f"{group}.{key}", str(value)) for group, values in groups.items() for key, value in values.items()]
    rows += [(key, str(record[key])) for key in ("base", "seed", "device", "dtype") if key in record]
    rows += [(f"version of {name}", version) for name, version in record["versions"].items()]
    return Table(("setting", "value"), tuple(rows))
