"""What a whole measurement of a training can be told; checked before anything is loaded. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from loraforge.errors import LoraforgeError, UsageError, did_you_mean, raise_problems

PROFILES = ("default", "document")
# What else the profiles are called.
_ALIASES = {"seed": "document"}
_WORDS = {
    "profile": PROFILES,
    "split": (None, "test", "eval", "train"),
    "method": ("exact", "taylor", "michel", "screen", "integrated"),
    "objective": ("task", "probe", "kl", "lm"),
    "ablate": ("zero", "mean", "resample"),
    "unit": ("q", "kv"),
    "dtype": ("float32", "float64", "bfloat16", "float16"),
}
_COUNTS = ("subset", "max_heads", "exact_top", "tokens_per_pass", "batch_size", "probe_steps", "topk")
_SHARES = ("hi", "lo")


@dataclass(frozen=True)
class MeasureSettings:
    """Settings of `measure_run`.

    Attributes:
        profile: `default`, or `document`: the document's files, columns and definitions (batch Fisher in training mode,
            Urel over the sum of norms).
        split: `test`, `eval` or `train`; None: the first of test and eval that the task has.
        subset: Rows to measure on; all of them where there are fewer.
        subset_seed: Of their choice.
        method: Of the importance: exact, taylor, michel, screen or integrated.
        objective: What the loss is: task, probe, kl or lm.
        ablate: What takes the place of a head: zero, mean or resample.
        unit: q: each query head; kv: all query heads of a key-value head together.
        layers: Layers that are measured, as `0-5,8`; None for all.
        max_heads: Largest number of heads that are ablated.
        exact_top: With `screen`: how many of the first heads are measured exactly.
        tokens_per_pass: Tokens in one forward pass of the ablations; None for the device's default.
        probe_steps: With `probe`: steps that the head is trained for.
        batch_size: Rows in a batch.
        dtype: Of the weights.
        device: auto, cpu or cuda[:i].
        spectrum: Whether singular values of the update are measured; None: of adapters, in the default profile.
        plots: Whether pictures and report are made.
        topk: Heads in the sets whose overlap is measured.
        hi: Percentile above which a head counts as important, or plastic.
        lo: Percentile below which it counts as neither.
    """

    profile: Literal["default", "document"] = "default"
    split: str | None = None
    subset: int | None = 1024
    subset_seed: int = 999
    method: str = "exact"
    objective: str = "task"
    ablate: str = "zero"
    unit: str = "q"
    layers: str | None = None
    max_heads: int | None = None
    exact_top: int | None = None
    tokens_per_pass: int | None = None
    probe_steps: int = 200
    batch_size: int = 16
    dtype: str = "float32"
    device: str = "auto"
    spectrum: bool | None = None
    plots: bool = True
    topk: int = 20
    hi: float = 90
    lo: float = 30

    def __post_init__(self) -> None:
        problems: list[LoraforgeError] = []
        for key, known in _WORDS.items():
            value = getattr(self, key)
            if value not in known:
                words = [word for word in known if word is not None]
                problems.append(_wrong(key, value, ", ".join(words), hint=did_you_mean(str(value), words)))
        for key in _COUNTS:
            value = getattr(self, key)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                problems.append(_wrong(key, value, "a whole number above 0"))
        for key in _SHARES:
            value = getattr(self, key)
            if not isinstance(value, int | float) or not 0 <= value <= 100:
                problems.append(_wrong(key, value, "a percentile from 0 to 100"))
        if not problems and self.lo >= self.hi:
            problems.append(_wrong("lo", f"lo {self.lo:g}, hi {self.hi:g}", "lo below hi"))
        if self.profile == "document" and (self.unit, self.layers, self.max_heads) != ("q", None, None):
            got = "unit, layers or max_heads"
            problems.append(_wrong("profile document", got, "every query head, as the document measures them"))
        raise_problems(problems)

    @classmethod
    def read(cls, content: Mapping[str, Any], where: object = "measure") -> MeasureSettings:
        """The settings of a mapping.

        Raises:
            UsageError: A key that is none, or a value that cannot be; all problems at once.
        """
        known = [field.name for field in fields(cls)]
        raise_problems(
            [
                UsageError(f"unknown setting '{key}' of a measurement", where=where, hint=did_you_mean(key, known))
                for key in content
                if key not in known
            ]
        )
        profile = content.get("profile", "default")
        return cls(**{**content, "profile": _ALIASES.get(profile, profile)})

    @property
    def is_document(self) -> bool:
        """Whether files and definitions are the document's."""
        return self.profile == "document"

    @property
    def order(self) -> str:
        """How rows are dealt into batches: in the subset's own order in the document, else by length."""
        return "given" if self.is_document else "length"

    def record(self) -> dict[str, Any]:
        """All settings, JSON-ready."""
        return asdict(self)


def _wrong(key: str, got: object, expected: str, hint: str | None = None) -> UsageError:
    return UsageError(f"'{key}' of a measurement cannot be this", got=got, expected=expected, hint=hint)
