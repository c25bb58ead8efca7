"""Confirms a layout by running the model: what heads are said to be must behave as heads.

Every projection's output is replaced by noise and every attention's contribution to the residual stream by nothing, so
each attention can be watched by itself, all of them in one pass and whatever the weights are. Then one row of the query
(or key) projection of a head is negated: exactly this head's slice of the output projection's input must change (for a
key-value head, the slices of its group), and all of it. Negated value rows likewise. Negation keeps norms, so models
that normalise queries over all heads pass. Hooks do all of this; no weight is touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from loraforge.errors import LoraforgeError
from loraforge.measure.heads.find import layout_of_model, modules_of, unwrapped
from loraforge.measure.heads.layout import HeadLayout
from loraforge.measure.heads.trials import FAILURES, Trials, check

UNREACHED = "not reached by random words alone; other inputs are needed to check it"
SHOWN = 4


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """What the doctor found.

    Attributes:
        layout: That was checked, without the attentions that the inputs could not reach.
        checks: {attention, check, passed, value, why} each. `value` is, for `q`, `k` and `v` of a head, the largest
            change outside its slice over that inside; for `once`, runs a pass; for `gate`, the largest difference to
            zeroed columns of the output projection.
        skipped: Module -> why it was passed over.
    """

    layout: HeadLayout
    checks: list[dict[str, Any]]
    skipped: Mapping[str, str]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(entry["passed"] for entry in self.checks)


def check_layout(
    model: nn.Module,
    layout: HeadLayout | None = None,
    *,
    seed: int = 0,
    every: bool = False,
    inputs: Mapping[str, Any] | None = None,
) -> DoctorReport:
    """Runs a model on two random rows and checks its layout; a failed check is reported, not raised.

    All attentions are checked together: about ten short passes, with `every` three times the number of heads a layer.

    Args:
        model: A transformers model, also with an unmerged PEFT adapter in it; weights, mode and hooks stay as they are.
        layout: What to check; None for what `layout_of_model` finds.
        seed: Of inputs, noise and the heads that are tried.
        every: Try every head, not only the first, the last and a random one of each attention.
        inputs: Keyword arguments of the forward, for a model that random ones do not suit.

    Raises:
        LoraforgeError: No layout was given and none is found.
    """
    layout = layout_of_model(model) if layout is None else layout
    modules = modules_of(model)
    missing = [a.o.module for a in layout.attentions if a.o.module not in modules]
    if missing:
        return DoctorReport(layout, [check("model", "names", False, None, f"it lacks {missing[0]}")], layout.skipped)
    try:
        with _evaluating(model), torch.no_grad():
            trials = Trials(model, modules, layout, seed=seed, inputs=inputs)
            if unreached := trials.first_pass():
                layout = _without(layout, unreached)
                trials = Trials(model, modules, layout, seed=seed, inputs=inputs)
                trials.first_pass()
            checks = trials.checks(every)
    except FAILURES as error:
        why = (str(error).strip() or "no message").splitlines()[0]
        checks = [check("model", "runs", False, None, f"{type(error).__name__}: {why}")]
    return DoctorReport(layout, checks, layout.skipped)


def confirmed_layout(model: nn.Module, *, inputs: Mapping[str, Any] | None = None) -> HeadLayout:
    """The layout of a model, found and confirmed.

    Args:
        model: A transformers model, also with an unmerged PEFT adapter in it.
        inputs: Keyword arguments of the forward; None for random ones.

    Raises:
        LoraforgeError: None is found, or it is not what the model does; lists the failed checks and the modules.
    """
    report = check_layout(model, inputs=inputs)
    require_passed(report, type(unwrapped(model)).__name__)
    return report.layout


def require_passed(report: DoctorReport, where: object) -> None:
    """Refuses a layout that was not confirmed.

    Raises:
        LoraforgeError: A check failed.
    """
    failed = [entry for entry in report.checks if not entry["passed"]]
    if not failed:
        return
    shown = "; ".join(f"{c['attention']}, {c['check']}: {c['why']}" for c in failed[:SHOWN])
    names = [a.o.module for a in report.layout.attentions]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    raise LoraforgeError(
        "the layout of the heads is not confirmed by what the model does",
        where=where,
        got=f"{len(failed)} of {len(report.checks)} checks failed ({shown}); modules {', '.join(names[:SHOWN])}{more}",
        expected="heads as the configuration says them, each a slice of the output projection's input",
        hint="check the numbers of heads in config.json; loraforge measure doctor MODEL --all shows every check",
    )


def _without(layout: HeadLayout, unreached: list[int]) -> HeadLayout:
    kept = tuple(a for i, a in enumerate(layout.attentions) if i not in unreached)
    return replace(
        layout,
        attentions=kept,
        skipped={**layout.skipped, **{layout.attentions[i].o.module: UNREACHED for i in unreached}},
    )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
