"""What a measurement of importance can be told; checked before anything is loaded. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from loraforge.errors import UsageError, did_you_mean

METHODS = ("exact", "taylor", "michel", "screen", "integrated")
PROFILES = ("default", "document")
DOCUMENT_KEYS = ("layer", "head", "I", "loss_base", "loss_ablate", "n")
DOCUMENT_BATCH = 16
EXACT_TOP = 20


@dataclass(frozen=True, slots=True)
class ImportanceSettings:
    """What decides the lines beside subject and versions; `measure_importance` says what each means.

    Raises:
        UsageError: Unknown or contradicting choices.
    """

    method: str
    objective: str
    ablate: str
    unit: str
    layers: list[int] | None
    max_heads: int | None
    exact_top: int | None
    tokens_per_pass: int | None
    probe_steps: int
    seed: int
    profile: str

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("profile", PROFILES)):
            if getattr(self, name) not in known:
                raise UsageError(
                    f"unknown {name}", where=f"--{name}", got=getattr(self, name),
                    hint=did_you_mean(getattr(self, name), known),
                )  # fmt: skip
        if self.ablate != "zero" and self.method in ("taylor", "michel", "screen"):
            raise UsageError(
                "gradients of the gates estimate ablation to zero", where="--ablate", got=self.ablate,
                expected="zero, or --method exact",
            )  # fmt: skip
        if self.exact_top is not None and self.method != "screen":
            raise UsageError("--exact-top belongs to screening", got=f"--method {self.method}", expected="screen")
        if self.profile == "document" and (self.method, self.ablate, self.unit) != ("exact", "zero", "q"):
            got = f"{self.method}, {self.ablate}, unit {self.unit}"
            raise UsageError("the document ablates each head exactly", where="--profile document", got=got)
