"""`loraforge measure doctor`: the heads of a model, and whether they are what the model computes with."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraforge.cli import _options as opt
from loraforge.cli._errors import BAD_INPUT
from loraforge.cli._output import Output
from loraforge.errors import UsageError

if TYPE_CHECKING:
    from loraforge.measure.heads.doctor import DoctorReport
    from loraforge.measure.heads.layout import Attention

Model = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="Model folder, or id in the cache.", show_default=False)
]
Adapter = Annotated[
    str | None, typer.Option("--adapter", metavar="FOLDER", help="PEFT adapter on it, unmerged.", show_default=False)
]
Every = Annotated[bool, typer.Option("--all", help="Try every head, not only three of each attention.")]
Seed = Annotated[int, typer.Option("--seed", help="Of inputs, noise and the heads that are tried.")]


def doctor(
    model: Model = None,
    adapter: Adapter = None,
    every: Every = False,
    seed: Seed = 0,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Find the heads of a model and confirm them by running it; exit code 3 where it refuses."""
    if model is None:
        raise UsageError("no model was given", expected="a model folder", hint="loraforge measure doctor MODEL")
    voice = Output(as_json=json, quiet=quiet, verbose=verbose)
    with voice.session():
        from loraforge.measure.heads.doctor import check_layout
        from loraforge.measure.heads.opening import open_for_doctor

        report = check_layout(open_for_doctor(model, adapter), seed=seed, every=every)
        layout = report.layout
        voice.result(
            {"model": model, "adapter": adapter, "passed": report.passed, "heads": len(layout.heads)}
            | {"layout": layout.to_json(), "sha256": layout.sha256, "checks": report.checks}
        )
        _print(voice, report)
    if not report.passed:
        failed = [entry for entry in report.checks if not entry["passed"]]
        sys.stderr.write(f"refused: {len(failed)} of {len(report.checks)} checks failed\n")
        raise typer.Exit(BAD_INPUT)


def _print(voice: Output, report: DoctorReport) -> None:
    """A row for each run of layers whose attentions are alike, then what failed and what was passed over."""
    groups: dict[tuple[Any, ...], list[Attention]] = {}
    for attention in report.layout.attentions:
        groups.setdefault(_alike(attention), []).append(attention)
    headers = ["stack", "kind", "layers", "heads", "kv heads", "head size", "projections", "checks"]
    voice.table(headers, [_row(report, attentions) for attentions in groups.values()])
    voice.line(f"\n{len(report.layout.heads)} heads in {len(report.layout.attentions)} attentions")
    for entry in report.checks:
        if not entry["passed"] or voice.verbose:
            voice.line(f"{entry['attention']}, {entry['check']}: {entry['why'] or 'ok'}")
    for module, reason in report.skipped.items():
        voice.note(f"passed over: {module}: {reason}")


def _alike(attention: Attention) -> tuple[Any, ...]:
    return attention.stack, attention.kind, attention.n_q, attention.n_kv, attention.o.size, _projections(attention)


def _projections(attention: Attention) -> str:
    """Modules of q, k, v and o inside their layer; one that several parts share is named once."""
    parts = [attention.part(name) for name in ("q", "k", "v", "o")]
    names = dict.fromkeys(part.module.removeprefix(f"{attention.block}.") for part in parts if part is not None)
    return " ".join(names)


def _row(report: DoctorReport, attentions: Sequence[Attention]) -> list[object]:
    first = attentions[0]
    names = {f"{a.stack} {a.kind} {a.layer}" for a in attentions}
    checks = [entry for entry in report.checks if entry["attention"] in names]
    passed = sum(entry["passed"] for entry in checks)
    word = f"{passed} of {len(checks)}" if passed < len(checks) else f"{passed} ok"
    layers = _spans([a.layer for a in attentions])
    return [first.stack, first.kind, layers, first.n_q, first.n_kv, first.o.size, _projections(first), word]


def _spans(numbers: Sequence[int]) -> str:
    """Numbers in order as spans: 0-11, or 3,7,11."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
