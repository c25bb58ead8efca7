"""Parameters of the calibrated methods (iteris, iteris-plus, regmean, regmean-plus-plus). Torch-free.

Names are the IterIS++ document's where it has one. Each field carries its help text and, where it is a choice, the
allowed values; everything is checked in one place when the object is made.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from loraforge.errors import UsageError

Auto = Literal["auto"]


def _param(default: Any, help_text: str, choices: tuple[Any, ...] | None = None, low: float | None = None) -> Any:
    metadata = {"help": help_text}
    extra: dict[str, Any] = {"choices": choices, "low": low}
    return field(default=default, metadata={**metadata, **{k: v for k, v in extra.items() if v is not None}})


@dataclass(frozen=True)
class IterisParams:
    """Everything that the calibrated methods can be told; defaults are those of `iteris-plus`."""

    init: str = _param(
        "sweep", "sweep: solve modules in running order, once; adapters: iterate from X~ = X", ("sweep", "adapters")
    )
    verify: bool = _param(True, "after a sweep, replay the merged model and iterate on if it is not a fixed point")
    max_iter: int = _param(10, "largest number of solves of every module", low=1)
    convergence_threshold: float = _param(1e-6, "relative change of the merged deltas that stops the iteration", low=0)
    target: str = _param(
        "task", "what the merged outputs match: the task model's, or W_i on merged inputs", ("task", "merged")
    )
    with_pretrain_matrix: int = _param(1, "0: the delta is solved for; 1: the full weight, then cut to rank R", (0, 1))
    lambda_weight: str = _param(
        "full", "task weight: ||W_i||^2 / ||X_i W_i^T||^2 of the full weight or of the delta", ("full", "delta", "none")
    )
    manual_ceof: tuple[float, ...] | None = _param(None, "c_i, one an adapter (the same as --weights)")
    alpha_1: float | Auto = _param(
        "auto", "regularisation of the cross-Gram, relative to ||C_i||_F; auto: held-out", low=0
    )
    alpha_2: float | Auto = _param("auto", "regularisation of the Gram, relative to ||G_i||_F; auto: held-out", low=0)
    reg_ceof: float | Auto = _param("auto", "rho: share of the task model's features in X~; auto: held-out", low=0)
    folds: int = _param(2, "folds of the held-out choice of alpha and rho", low=2)
    cross_norm: str = _param("gram", "norm that scales alpha_1: of C_i (exact), or of G_i", ("exact", "gram"))
    offdiag: float = _param(1.0, "factor on the off-diagonal of the Grams (RegMean's 0.9)", low=0)
    use_mats: bool = _param(True, "Anderson mixing of the fixed-point iteration")
    mats_history_size: int = _param(5, "iterates that Anderson mixing remembers", low=1)
    mats_regularization: float = _param(1e-6, "Tikhonov term of its least squares", low=0)
    mats_reg_mode: str = _param(
        "relative", "relative to the mean squared residual difference, or absolute", ("relative", "absolute")
    )
    mats_scope: str = _param("layer", "one history a module, or one over all modules", ("layer", "global"))
    use_camr: bool = _param(False, "curvature-aware diagonal instead of the isotropic regulariser")
    camr_alpha: float | None = _param(None, "strength; default alpha_1", low=0)
    camr_beta: float = _param(1e-8, "smallest regularisation", low=0)
    camr_direction: str = _param(
        "document", "more where the variance is high, or where it is low", ("document", "inverse")
    )
    camr_normalize: str = _param(
        "mean", "the variances are divided by their mean, sum or maximum", ("mean", "sum", "max")
    )
    camr_scale: str = _param("fro", "relative to the isotropic term's ||G_i||_F, or absolute", ("fro", "abs"))
    camr_cross: str = _param(
        "matched", "the same diagonal on the cross-Gram, none, or the isotropic one", ("matched", "none", "iso")
    )
    use_dcs: bool = _param(False, "weights on samples by the variance of the adapters' outputs")
    dcs_sigma: float = _param(1.0, "factor on the MAD", low=0)
    dcs_min_ess: float = _param(0.25, "floor of the effective sample size as a share; 0 is the literal formula", low=0)
    dcs_kernel: Literal["gaussian", "excess"] = _param(
        "gaussian", "exp(-V/sigma^2), or the unit-free excess over the median", ("gaussian", "excess")
    )
    dcs_mad_consistent: bool = _param(False, "multiply the MAD by 1.4826")
    truncate_metric: str = _param(
        "output", "a rank rule cuts in the metric of the outputs or of the weights", ("output", "frobenius")
    )
    collect: str = _param(
        "teacher-forced",
        "encoder-decoder tokens: labels (or one generation), prompt only, last step",
        ("teacher-forced", "prefill", "generate-last"),
    )
    max_new_tokens: int = _param(20, "length of the generation where no labels are given", low=1)
    base_dtype: str = _param(
        "float32", "dtype of the base model's forward", ("float32", "float64", "bfloat16", "float16")
    )
    samples_num: int = _param(256, "calibration samples a task; all of a smaller file", low=1)
    max_length: int = _param(256, "tokens a sample", low=1)
    select_long: bool = _param(False, "prefer long samples, as the document does")
    if_balance: bool = _param(False, "the same number of samples a class")
    if_divide: bool = _param(False, "batches of inner_num samples")
    inner_num: int = _param(4, "samples a batch with if_divide", low=1)
    outer_num: int = _param(5, "batches with if_divide", low=1)
    shuffle: bool = _param(True, "draw the samples at random instead of taking the first")
    seed: int = _param(42, "seed of the draw", low=0)

    def __post_init__(self) -> None:
        """Checks every field against its choices and its range."""
        for f in dataclasses.fields(self):
            _check(f, getattr(self, f.name))
        if (self.alpha_1 == "auto") != (self.alpha_2 == "auto"):
            raise UsageError(
                "alpha_1 and alpha_2 are chosen together",
                got=f"alpha_1={self.alpha_1}, alpha_2={self.alpha_2}",
                expected="both auto or both numbers",
            )
        if self.reg_ceof != "auto" and self.reg_ceof > 1:
            raise UsageError("reg_ceof is a share", got=self.reg_ceof, expected="auto or a number in [0, 1]")
        if self.target == "merged" and self.reg_ceof != 0.0:
            raise UsageError(
                "target=merged has no task features to mix in", got=f"reg_ceof={self.reg_ceof}", expected="reg_ceof=0"
            )
        if self.dcs_min_ess > 1:
            raise UsageError("dcs_min_ess is a share", got=self.dcs_min_ess, expected="a number in [0, 1]")
        if self.if_divide and self.inner_num * self.outer_num != self.samples_num:
            raise UsageError(
                "inner_num x outer_num must equal samples_num when if_divide is on",
                got=f"{self.inner_num} x {self.outer_num} != {self.samples_num}",
            )

    @property
    def searches(self) -> bool:
        """Whether alpha or rho is chosen on held-out folds."""
        return "auto" in (self.alpha_1, self.reg_ceof)


def _check(f: dataclasses.Field[Any], value: Any) -> None:
    """Refuses a value outside the field's choices or below its least value.

    Raises:
        UsageError: Names the field, the value found and what is allowed.
    """
    choices = f.metadata.get("choices")
    if choices is not None and value not in choices:
        raise UsageError(
            f"parameter '{f.name}' has a value outside its choices",
            got=repr(value),
            expected=" | ".join(map(str, choices)),
        )
    kind = str(f.type)
    if kind == "bool" and not isinstance(value, bool):
        raise UsageError(f"parameter '{f.name}' must be true or false", got=repr(value))
    if (value is None and "None" in kind) or (value == "auto" and "Auto" in kind):
        return
    if f.name == "manual_ceof" and not (isinstance(value, list | tuple) and all(_is_number(v) for v in value)):
        raise UsageError(f"parameter '{f.name}' must be a list of numbers", got=repr(value))
    low = f.metadata.get("low")
    if low is None:
        return
    if not _is_number(value) or (kind == "int" and not isinstance(value, int)):
        wanted = "a whole number" if kind == "int" else "a number or auto" if "Auto" in kind else "a number"
        raise UsageError(f"parameter '{f.name}' must be {wanted}", got=repr(value))
    if not math.isfinite(value) or value < low:
        raise UsageError(f"parameter '{f.name}' is out of range", got=value, expected=f"a number >= {low}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
