"""What a merge method is to the rest of the program: one row. Torch-free."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from loraforge.errors import UsageError, did_you_mean


@dataclass(frozen=True)
class NoParams:
    """A method without parameters of its own."""


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
        function: "module:function": `merge_layer(LayerInputs, Params) -> Merged`, or `solve_layer` if calibrated.
        default_weight: "one" (sums) or "mean" (1/N).
        default_rank: "full" (rank R, lossless) or "max" (the largest r_i of the module).
        defaults: Parameter defaults that differ from the dataclass (families share parameters, not copies).
        aliases: Other names.
        survey: "module:function": `survey(layers, params, adapters) -> context`, called once before the merge with
            `layers()` giving all modules afresh each time it is called; its result reaches every LayerInputs.
        post: "iso": the spectrum of the result is flattened after the rank rule (loraforge.linalg.flatten).
        checkpoints: It also merges full checkpoints against a base.
        other_tensors: Of checkpoints, what becomes of tensors that are no matrices: "mean", "sum", or "method" (treated
            as one row of a matrix like any other).
        stats: "diag": it can use input statistics (`--stats`).
        counts: Fewest and most adapters it takes (None: any number).
        weighted: It takes weights.
        equal_ranks: The adapters must have the same rank in each module.
        lone: Parameters under which one adapter alone comes back unchanged; None: it never does.
        identical: What N copies of one adapter give under `lone`: "sum" (N times it), "mean" (it), None (neither).
        gauge: Only the products B A count, not the factors.
        span: "sum": the result has at most rank sum r_i; "max": the largest r_i.
        own_rule: It cuts the weighted sum by itself: rank options that are parameters of it reach it as such.
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
    survey: str | None = None
    post: Literal["none", "iso"] = "none"
    checkpoints: bool = False
    other_tensors: Literal["mean", "sum", "method"] = "mean"
    stats: Literal["diag"] | None = None
    counts: tuple[int, int | None] = (1, None)
    weighted: bool = True
    equal_ranks: bool = False
    lone: Mapping[str, Any] | None = field(default_factory=dict)
    identical: Literal["sum", "mean"] | None = "mean"
    gauge: bool = True
    span: Literal["sum", "max"] = "sum"
    own_rule: bool = False

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

    def load_survey(self) -> Callable[..., Any] | None:
        """The method's survey over all modules, or None (imports torch)."""
        if self.survey is None:
            return None
        found: Callable[..., Any] = _load(self.survey)
        return found

    def load_function(self) -> Callable[..., Any]:
        """The method's function (imports torch)."""
        found: Callable[..., Any] = _load(self.function)
        return found


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
