"""The table of merge methods. Torch-free, so that `loraforge methods` and completion start at once.

A method is one row here and one file beside this one. `params` and `function` are "module:name", imported on use.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from loraforge.errors import UsageError, did_you_mean


@dataclass(frozen=True, slots=True)
class MethodRow:
    """One merge method.

    Attributes:
        name: The word on the command line.
        title: The idea in about eight words.
        needs: "adapters" (nothing else) or "calibration" (base model and calibration data).
        output: Rank of the result.
        cost: Leading cost a module.
        paper: Source.
        params: "module:Class" of the frozen dataclass of parameters (the module must not import torch).
        function: "module:function": `merge_layer(LayerInputs, Params) -> LowRank`, or `solve_layer` if calibrated.
        default_weight: "one" (sums) or "mean" (1/N).
        default_rank: "full" (rank R, lossless) or "max" (the largest r_i of the module).
        defaults: Parameter defaults that differ from the dataclass (families share parameters, not copies).
    """

    name: str
    title: str
    needs: Literal["adapters", "calibration"]
    output: str
    cost: str
    paper: str
    params: str
    function: str
    default_weight: Literal["one", "mean"] = "one"
    default_rank: Literal["full", "max"] = "full"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()

    def params_class(self) -> type[Any]:
        """The dataclass of this method's parameters."""
        found: type[Any] = _load(self.params)
        return found

    def make_params(self, values: Mapping[str, Any] | None = None) -> Any:
        """The parameters with this row's defaults and the user's values.

        Raises:
            UsageError: An unknown name (with the closest known one) or a value outside the allowed set.
        """
        cls = self.params_class()
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values or {}:
            if key not in known:
                raise UsageError(
                    f"unknown parameter '{key}' of method '{self.name}'",
                    hint=did_you_mean(key, known) if known else f"'{self.name}' has no parameters",
                )
        return cls(**{**self.defaults, **(values or {})})

    def load_function(self) -> Callable[..., Any]:
        """The method's function (imports torch)."""
        found: Callable[..., Any] = _load(self.function)
        return found


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


_ITERIS = {
    "needs": "calibration",
    "params": "loraforge.merging.iteris_params:IterisParams",
    "function": "loraforge.merging.iteris:solve_layer",
    "output": "R = sum r_i",
}
# The published methods: fixed small regularisation, the delta as target, none of IterIS++'s additions.
_PLAIN: dict[str, Any] = {
    "cross_norm": "exact",
    "use_mats": False,
    "use_camr": False,
    "use_dcs": False,
    "reg_ceof": 0.0,
    "with_pretrain_matrix": 0,
}
_REGMEAN = _PLAIN | {"alpha_1": 1e-6, "alpha_2": 1e-6, "lambda_weight": "none"}
_NO_PARAMS = "loraforge.merging.methods:NoParams"


@dataclass(frozen=True)
class NoParams:
    """A method without parameters of its own."""


_ROWS: tuple[MethodRow, ...] = (
    MethodRow(
        name="iteris-plus",
        title="align merged outputs with each adapter's, one sweep",
        cost="2 forwards + S d^2 + d^3/3",
        paper="IterIS++: IterIS (arXiv 2411.15231) with MATS, CAMR, DCS",
        **_ITERIS,  # type: ignore[arg-type]
    ),
    MethodRow(
        name="iteris",
        title="iterative inference-solving alignment, plain iteration",
        cost="max_iter x (2 forwards + S d^2 + d^3/3)",
        paper="Chen et al., CVPR 2025, arXiv 2411.15231",
        defaults=_PLAIN | {"init": "adapters", "alpha_1": 1e-7, "alpha_2": 1e-7, "lambda_weight": "full"},
        **_ITERIS,  # type: ignore[arg-type]
    ),
    MethodRow(
        name="regmean",
        title="least squares on each adapter's own activations",
        cost="1 forward + S d^2 + d^3/3",
        paper="Jin et al., ICLR 2023, arXiv 2212.09849",
        defaults=_REGMEAN | {"init": "adapters", "max_iter": 1},
        **_ITERIS,  # type: ignore[arg-type]
    ),
    MethodRow(
        name="regmean-plus-plus",
        title="RegMean on the merged model's own activations, in order",
        cost="2 forwards + S d^2 + d^3/3",
        paper="RegMean++, arXiv 2508.03121",
        defaults=_REGMEAN | {"target": "merged"},
        **_ITERIS,  # type: ignore[arg-type]
    ),
    MethodRow(
        name="weighted-average",
        title="exact weighted mean of the deltas",
        needs="adapters",
        output="R = sum r_i",
        cost="copy of the factors",
        paper="model soups, arXiv 2203.05482",
        params=_NO_PARAMS,
        function="loraforge.merging.weighted_average:merge_layer",
        default_weight="mean",
    ),
    MethodRow(
        name="task-arithmetic",
        title="exact weighted sum of the deltas",
        needs="adapters",
        output="R = sum r_i",
        cost="copy of the factors",
        paper="Ilharco et al., ICLR 2023, arXiv 2212.04089",
        params=_NO_PARAMS,
        function="loraforge.merging.task_arithmetic:merge_layer",
        aliases=("linear",),
    ),
    MethodRow(
        name="concat",
        title="factors side by side, no re-ranking",
        needs="adapters",
        output="R = sum r_i",
        cost="copy of the factors",
        paper="PEFT `cat`",
        params=_NO_PARAMS,
        function="loraforge.merging.concat:merge_layer",
    ),
    MethodRow(
        name="svd",
        title="best rank-k approximation of the weighted sum",
        needs="adapters",
        output="k (default max r_i)",
        cost="(m + n) R^2 + R^3",
        paper="Eckart-Young on the factors",
        params=_NO_PARAMS,
        function="loraforge.merging.svd:merge_layer",
        default_rank="max",
    ),
)

METHODS: dict[str, MethodRow] = {row.name: row for row in _ROWS}


def find_method(name: str) -> MethodRow:
    """The row of a method name or alias.

    Raises:
        UsageError: Unknown name; the message has the closest known one.
    """
    for row in _ROWS:
        if name == row.name or name in row.aliases:
            return row
    raise UsageError(
        f"unknown merge method '{name}'",
        hint=did_you_mean(name, METHODS) + "; `loraforge methods` explains them",
    )
