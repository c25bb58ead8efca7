"""The options of a merge, read and checked: parameters, rank rule, weights, statistics, device, format."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from loraforge.adapters import Adapter
from loraforge.errors import LoraforgeError, UsageError, did_you_mean
from loraforge.linalg.rank import RankRule
from loraforge.merging.job import Loader
from loraforge.merging.row import MethodRow

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def make_parameters(
    row: MethodRow, values: dict[str, Any], drawing: Mapping[str, Any], calibrating: Mapping[str, Any]
) -> Any:
    """The method's parameters; what only calibrated methods read is refused elsewhere.

    Args:
        row: The method.
        values: Parameters by name, changed in place.
        drawing: Options that are also parameters of some methods (seed, samples); those given and known are taken over.
        calibrating: Options that only calibrated methods read.

    Raises:
        UsageError: An unknown parameter, or calibration options for a method that uses none.
    """
    known = {f.name for f in dataclasses.fields(row.params_class())}
    values |= {key: value for key, value in drawing.items() if value is not None and key in known}
    if row.needs != "calibration":
        given = [f"--{name.replace('_', '-')}" for name, value in calibrating.items() if value is not None]
        if given:
            raise UsageError(
                f"method '{row.name}' uses no calibration data",
                got=", ".join(given),
                hint="leave these options out, or choose iteris-plus",
            )
    return row.make_params(values)


def split_rank_options(row: MethodRow, options: Mapping[str, Any]) -> tuple[dict[str, Any], RankRule]:
    """A method that cuts by itself (rsvd) gets the user's rule as parameters; the result of any other is cut by it.

    Args:
        row: The method.
        options: RANK_OPTIONS, None where not given.

    Returns:
        Parameters to set, and the rule that is applied to the result.
    """
    given = {key: value for key, value in options.items() if value is not None}
    known = {f.name for f in dataclasses.fields(row.params_class())}
    whole = RankRule(**given)
    if not row.own_rule:
        return {}, whole
    own = {key: value for key, value in given.items() if key in known}
    return own, RankRule(**{key: value for key, value in given.items() if key not in known})


def choose_weights(row: MethodRow, params: Any, weights: Sequence[float] | None, count: int) -> list[float]:
    """One weight an adapter; `manual_ceof` of the calibrated methods says the same thing.

    Raises:
        UsageError: Both are given, or one is no number.
        LoraforgeError: A wrong number of weights, or one that is not finite.
    """
    manual = getattr(params, "manual_ceof", None)
    if weights is not None and manual is not None:
        raise UsageError("--weights and manual_ceof both set the coefficients", hint="give one of the two")
    chosen = weights if weights is not None else manual
    if chosen is None:
        return [1.0 / count if row.default_weight == "mean" else 1.0] * count
    if len(chosen) != count:
        raise LoraforgeError(
            "the number of weights is wrong", got=f"{len(chosen)} weights", expected=f"{count}, one an adapter"
        )
    try:
        values = [float(w) for w in chosen]
    except (TypeError, ValueError) as error:
        raise UsageError("a weight is not a number", got=repr(chosen), expected="one number an adapter") from error
    if not all(w == w and abs(w) != float("inf") for w in values):
        raise LoraforgeError("a weight is not finite", got=values, expected="finite numbers")
    return values


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuses a word that is none of `choices`.

    Raises:
        UsageError: With the closest known word.
    """
    if value not in choices:
        raise UsageError(f"unknown value of {name}", got=value, hint=did_you_mean(value, choices))


def post_params(row: MethodRow, params: Any, post: str) -> Any:
    """Parameters of the flattening after the rank rule: the method's own, the default ones of `--post iso`, or None."""
    if row.post == "iso":
        return params
    if post == "none":
        return None
    from loraforge.merging.spectral_params import IsoParams

    return IsoParams()


def check_budget(row: MethodRow, budget: int | None, rule: RankRule, *, uniform_rank: bool = False) -> int | None:
    """The parameter budget.

    Raises:
        UsageError: No positive whole number, beside another rank rule, or for a calibrated method.
    """
    if budget is None:
        return None
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise UsageError("A budget is not a positive whole number", where="budget", got=budget, expected="parameters")
    if row.needs == "calibration":
        raise UsageError("A budget is for data-free methods", got=row.name, hint="use --rank, or resize the result")
    if uniform_rank:
        raise UsageError("--uniform-rank pads all modules beyond a --budget", expected="one of the two")
    if not RankRule(min_rank=rule.min_rank) == RankRule(**{**dataclasses.asdict(rule), "max_rank": None}):
        raise UsageError("--budget is a rank rule of its own", hint="it goes with --min-rank and --max-rank only")
    return budget


def load_statistics(
    row: MethodRow, stats: Mapping[str, Any] | Sequence[Any] | None, names: Sequence[str], modules: Sequence[str]
) -> list[Mapping[str, Any]]:
    """Input statistics by module, one mapping an adapter.

    Raises:
        UsageError: The method reads none, or a name that no adapter has.
        LoraforgeError: Another number than adapters, or a file that lacks a module.
    """
    if stats is None:
        return []
    if row.stats is None:
        raise UsageError(f"method '{row.name}' reads no input statistics", got="--stats", hint="leave it out")
    from loraforge.input_stats import stats_for

    if len(stats) != len(names):
        raise LoraforgeError("the number of statistics files is wrong", got=len(stats), expected=f"{len(names)}")
    if isinstance(stats, Mapping):
        unknown = [name for name in stats if name not in names]
        if unknown:
            raise UsageError("statistics name no adapter", got=unknown[0], hint=did_you_mean(unknown[0], names))
        stats = [stats[name] for name in names]
    return [stats_for(path, modules) for path in stats]


def choose_loader(
    row: MethodRow, adapters: Sequence[Adapter], base: Any, rule: RankRule, output_kind: str, device: torch.device
) -> Loader:
    """How modules are read: as they are, or with DoRA turned into an additive update of the base.

    That update is whole where a model is written by a method that takes task vectors, else cut to a low rank: by the
    user's rank rule where there is one.
    """
    if not any(a.has_dora for a in adapters):
        return Loader()
    from loraforge.merging.models.dora import DoraLoader

    whole = output_kind == "model" and row.checkpoints
    return DoraLoader(base, rule=None if rule.is_lossless else rule, dense=whole, device=device)


def choose_format(asked: str, adapters: Sequence[Adapter]) -> str:
    """The format to write: the asked one; with auto the one that all adapters share, else PEFT."""
    if asked != "auto":
        return asked
    shared = {a.format for a in adapters}
    return shared.pop() if len(shared) == 1 and shared <= {"kohya", "diffusers"} else "peft"


def advice(params: Any, *, models: bool = False) -> list[str]:
    """What the parameters say of themselves that a user should know (their `warning`, where they have one)."""
    found = getattr(params, "model_warning" if models else "warning", None)
    return [found] if found else []
