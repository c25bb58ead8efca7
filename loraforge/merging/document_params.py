"""Parameters of the rSVD document's methods: rsvd and geometric-mean. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from loraforge.errors import UsageError


def _param(default: Any, help_text: str, choices: tuple[Any, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help_text} | ({"choices": choices} if choices else {}))


@dataclass(frozen=True)
class RsvdParams:
    """What `rsvd` can be told. The rank rule is the method's own: the sketch is made as wide as it asks for."""

    energy: float = _param(0.99, "smallest rank that keeps this share of sum S^2; of no effect beside another rule")
    min_rank: int | None = _param(None, "smallest rank; 4 with the energy rule, 1 with any other")
    max_rank: int | None = _param(None, "largest rank; 32 with the energy rule, none with any other")
    rank: int | None = _param(None, "fixed rank instead of the energy rule")
    nuclear: float | None = _param(None, "share of sum S instead of the energy rule (exact form only)")
    ratio: float | None = _param(None, "keep S_i > S_1 / ratio instead of the energy rule")
    fro_error: float | None = _param(None, "relative Frobenius error instead of the energy rule")
    oversampling: int = _param(8, "columns of the sketch beyond the rank")
    power_iterations: int = _param(2, "power steps of the range finder")
    exact: str = _param(
        "auto", "the exact decomposition: where it is cheaper, everywhere, nowhere", ("auto", "always", "never")
    )
    seed: int = _param(0, "seed of the sketch; draws are keyed by seed and module")
    document_compat: bool = _param(
        False, "the document's code step by step: its weight, its sqrt(alpha) factor, its ranks; two adapters only"
    )

    def __post_init__(self) -> None:
        """Checks every field against its range.

        Raises:
            UsageError: Names the field, what came and what is allowed.
        """
        for name, least in (("oversampling", 0), ("power_iterations", 0), ("seed", 0)):
            _check_whole(name, getattr(self, name), least)
        for name in ("min_rank", "max_rank", "rank"):
            if getattr(self, name) is not None:
                _check_whole(name, getattr(self, name), 1)
        _check_number("energy", self.energy, 0.0, 1.0)
        _check_number("nuclear", self.nuclear, 0.0, 1.0)
        _check_number("ratio", self.ratio, 1.0, math.inf)
        if self.fro_error is not None and (isinstance(self.fro_error, bool) or not 0.0 <= self.fro_error < 1.0):
            raise UsageError(
                "parameter 'fro_error' is out of range", got=repr(self.fro_error), expected="0 <= fro_error < 1"
            )
        _check_choice("exact", self.exact, ("auto", "always", "never"))
        _check_flag("document_compat", self.document_compat)
        goals = [name for name in ("rank", "nuclear", "ratio", "fro_error") if getattr(self, name) is not None]
        if len(goals) > 1 or (goals and self.document_compat):
            raise UsageError(
                "rsvd follows one rank rule"
                + (", document_compat its own energy rule" if self.document_compat else ""),
                where=", ".join(goals),
                got=", ".join(f"{name}={getattr(self, name)}" for name in goals),
                expected="at most one of rank, nuclear, ratio, fro_error" if len(goals) > 1 else "energy",
            )
        least_rank, most = self.bounds
        if most is not None and least_rank > most:
            raise UsageError("The largest rank is below the smallest", got=f"min_rank={least_rank}, max_rank={most}")

    @property
    def warning(self) -> str | None:
        """What a user should know of the result."""
        if not self.document_compat:
            return None
        return "document_compat counts alpha twice, weights by norms and depends on the order of the adapters"

    @property
    def goal(self) -> dict[str, Any]:
        """The rank rule's goal by its name: the energy unless another was given."""
        for name in ("rank", "nuclear", "ratio", "fro_error"):
            if getattr(self, name) is not None:
                return {name: getattr(self, name)}
        return {"energy": self.energy}

    @property
    def bounds(self) -> tuple[int, int | None]:
        """Smallest and largest rank: what was given, else the document's 4 and 32 where the energy rule holds."""
        low, high = (4, 32) if "energy" in self.goal else (1, None)
        least = self.min_rank if self.min_rank is not None else min(low, self.max_rank or low)
        most = self.max_rank if self.max_rank is not None else None if high is None else max(high, least)
        return least, most


@dataclass(frozen=True)
class GeometricMeanParams:
    """What `geometric-mean` can be told."""

    variant: str = _param(
        "document", "the document's formula, or its published code (two adapters)", ("document", "code")
    )
    align: bool = _param(
        False, "merge in a basis that all deltas share, so that the result does not depend on how they are factorised"
    )

    def __post_init__(self) -> None:
        """Checks the fields, and that only one of the two forms is asked for.

        Raises:
            UsageError: Names the field.
        """
        _check_choice("variant", self.variant, ("document", "code"))
        _check_flag("align", self.align)
        if self.align and self.variant == "code":
            raise UsageError("align and variant=code exclude each other", expected="one of the two")

    @property
    def warning(self) -> str | None:
        """What a user should know of the result."""
        if self.align:
            return None
        return (
            "geometric-mean takes roots of the raw factors entry by entry: the result depends on how each adapter is "
            "factorised, not on its update alone; --set align=true merges in a basis that all updates share"
        )


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"parameter '{name}' is out of range", got=repr(value), expected=f"a whole number >= {least}")


def _check_number(name: str, value: Any, above: float, most: float) -> None:
    """Refuses anything but None or a number in (above, most]; an infinite bound is open."""
    if value is None and name != "energy":
        return
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not above < value <= most:
        expected = f"a number above {above:g}" + ("" if math.isinf(most) else f", at most {most:g}")
        raise UsageError(f"parameter '{name}' is out of range", got=repr(value), expected=expected)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"parameter '{name}' has an unknown value", got=repr(value), expected=" | ".join(choices))


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise UsageError(f"parameter '{name}' must be true or false", got=repr(value))
