"""Parameters of the spectral methods: iso-c, iso-cts, iso-iasad, tsv, wudi, svc; and of `--post iso`. Torch-free.

Names are the source document's where it has one. Each field carries its help text and, where it is a choice, the
allowed values; everything is checked when the object is made.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from loraforge.errors import UsageError


def _param(default: Any, help_text: str, choices: tuple[Any, ...] | None = None, **bounds: float) -> Any:
    """A field; bounds: `low` and `high` (included), `above` and `below` (excluded)."""
    return field(default=default, metadata={"help": help_text, **({"choices": choices} if choices else {}), **bounds})


@dataclass(frozen=True)
class _Checked:
    """Checks every field against its choices and bounds."""

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            UsageError: Names the field, the value found and what is allowed.
        """
        for f in dataclasses.fields(self):
            _check(f, getattr(self, f.name))


@dataclass(frozen=True)
class IsoParams(_Checked):
    """How a spectrum is flattened, after the rank rule."""

    mean_over: str = _param(
        "support", "average over the directions that are there, or over all min(m, n)", ("support", "full")
    )
    average: str = _param(
        "mean",
        "what stays: mean keeps the nuclear norm, rms the Frobenius norm, geo the product",
        ("mean", "rms", "geo"),
    )
    power: float = _param(1.0, "s -> s^(1 - power): 1 makes all singular values equal, 0 keeps them", low=0, high=1)
    alpha: float = _param(1.0, "factor on the merged update; papers tune it on validation data", above=0)
    target_norm: str = _param(
        "none",
        "rescale to the nuclear or Frobenius norm before flattening, or to the adapters' mean norm",
        ("none", "nuclear", "fro", "mean-adapter"),
    )

    def __post_init__(self) -> None:
        """Checks every field."""
        super().__post_init__()
        if self.average == "geo" and self.mean_over == "full":
            raise UsageError(
                "a geometric mean over directions of singular value 0 is 0",
                where="average, mean_over",
                got="average=geo, mean_over=full",
                expected="mean_over=support with average=geo",
            )

    @property
    def warning(self) -> str | None:
        """What the user should know of these settings."""
        if self.alpha != 1.0 or self.target_norm != "none":
            return None
        return "alpha=1: the isotropic papers tune the strength on validation data; --set alpha=... or target_norm=..."

    @property
    def model_warning(self) -> str | None:
        """The same for full models."""
        return IsoParams.warning.fget(self)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class IsoCtsParams(IsoParams):
    """Iso-CTS."""

    common_fraction: float = _param(
        0.8, "share of the directions that the common subspace gets; the tasks share the rest", low=0, high=1
    )


@dataclass(frozen=True)
class IasadParams(IsoParams):
    """Iso-IASAD. `auto` takes what `preset` says."""

    preset: str = _param(
        "none",
        "what auto means: none (largest, no centring, support), document, or published-code",
        ("none", "document", "published-code"),
    )
    iters: int = _param(10, "rounds of low-rank and sparse projection", low=1)
    sparsity: float = _param(
        0.1, "compression rate: share of the entries that low-rank and sparse part together save", low=0, below=1
    )
    compression: float | None = _param(None, "the same as sparsity", low=0, below=1)
    rank_ratio: float = _param(0.75, "share of the low-rank part in what is not saved", low=0, high=1)
    prune_level: str = _param("row", "the sparse part is chosen by row or over the whole matrix", ("row", "element"))
    keep: str = _param("auto", "which entries the sparse part keeps; auto: largest", ("auto", "largest", "smallest"))
    rank_basis: str = _param(
        "budget",
        "rank of the low-rank part from the budget of m x n, or from the adapter's own rank",
        ("budget", "lora"),
    )
    center: str = _param(
        "auto",
        "none; mean: split each delta minus their mean, add it back; drop-mean: without adding it back; auto: none",
        ("auto", "none", "mean", "drop-mean"),
    )
    final_svd: str = _param(
        "auto", "one more low-rank step after the last round, or the last round's; auto: on", ("auto", "on", "off")
    )
    mean_over: str = _param(
        "auto",
        "average over the directions that are there, or over all min(m, n); auto: support",
        ("auto", "support", "full"),
    )

    def __post_init__(self) -> None:
        """Checks every field and resolves the alias and the preset, so that what is reported is what was used."""
        super().__post_init__()
        if self.compression is not None:
            default = next(f.default for f in dataclasses.fields(self) if f.name == "sparsity")
            if self.sparsity not in (default, self.compression):
                raise UsageError(
                    "sparsity and compression are two names of one parameter",
                    got=f"sparsity={self.sparsity}, compression={self.compression}",
                    expected="one of the two",
                )
            object.__setattr__(self, "sparsity", self.compression)
            object.__setattr__(self, "compression", None)
        for name, value in IASAD_PRESETS[self.preset].items():
            if getattr(self, name) == "auto":
                object.__setattr__(self, name, value)
        super().__post_init__()  # mean_over is known only now

    @property
    def warning(self) -> str | None:
        """What the user should know of these settings."""
        if self.rank_basis == "lora":
            return super().warning
        if self.center == "drop-mean":
            return "center=drop-mean takes the mean off and does not add it back: adapters within the budget give 0"
        return "rank_basis=budget keeps any delta of rank below the budget as it is: for adapters this equals iso-c"


# What `auto` stands for. `document` takes the source document by its word, `published-code` does what its code does.
IASAD_PRESETS: dict[str, dict[str, str]] = {
    "none": {"keep": "largest", "center": "none", "final_svd": "on", "mean_over": "support"},
    "document": {"keep": "smallest", "center": "none", "final_svd": "off", "mean_over": "full"},
    "published-code": {"keep": "largest", "center": "drop-mean", "final_svd": "on", "mean_over": "full"},
}


@dataclass(frozen=True)
class TsvParams(_Checked):
    """TSV-M."""

    k: int | None = _param(
        None, "singular directions of each task; none: all r_i of an adapter, min(m, n) / N of a checkpoint", low=1
    )


@dataclass(frozen=True)
class WudiParams(_Checked):
    """WUDI in closed form."""

    ridge: float = _param(
        0.0, "added to the diagonal of the sum of Grams (each of trace 1); for tasks that are much alike", low=0
    )


@dataclass(frozen=True)
class SvcParams(_Checked):
    """Singular value calibration."""

    alpha: float = _param(0.1, "least projection coefficient that enters the calibration of a direction", above=0)


def _check(f: dataclasses.Field[Any], value: Any) -> None:
    """Refuses a value outside the field's choices, type or bounds.

    Raises:
        UsageError: Names the field, the value found and what is allowed.
    """
    choices = f.metadata.get("choices")
    if choices is not None and value not in choices:
        raise UsageError(
            f"parameter '{f.name}' has a value outside its choices",
            where=f.name,
            got=repr(value),
            expected=" | ".join(map(str, choices)),
        )
    kind = str(f.type)
    if choices is not None or (value is None and "None" in kind):
        return
    whole = "int" in kind
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not math.isfinite(value):
        wanted = "a whole number" if whole else "a finite number"
        raise UsageError(f"parameter '{f.name}' must be {wanted}", where=f.name, got=repr(value), expected=wanted)
    rules = {
        "low": (">=", value.__ge__),
        "above": (">", value.__gt__),
        "high": ("<=", value.__le__),
        "below": ("<", value.__lt__),
    }
    limits = {name: f.metadata[name] for name in rules if name in f.metadata}
    if not all(rules[name][1](limit) is True for name, limit in limits.items()):
        allowed = " and ".join(f"{rules[name][0]} {limit:g}" for name, limit in limits.items())
        raise UsageError(
            f"parameter '{f.name}' is out of range", where=f.name, got=value, expected=f"a number {allowed}"
        )
