"""The table of merge methods. Torch-free, so that `loraforge methods` and completion start at once.

A method is one row here and one file beside this one. `params` and `function` are "module:name", imported on use.
"""

from __future__ import annotations

from typing import Any

from loraforge.errors import UsageError, did_you_mean
from loraforge.merging.row import MethodRow, NoParams

__all__ = ["METHODS", "MethodRow", "NoParams", "find_method"]

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
_NO_PARAMS = "loraforge.merging.row:NoParams"


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
