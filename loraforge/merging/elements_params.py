"""Parameters of the element-wise methods. Torch-free.

These are ties, dare, dare-ties, della, breadcrumbs and magnitude-prune, and their forms in shared spaces: knots-ties,
core-ties, core-dare.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from loraforge.errors import UsageError

DENSITY = "share of the entries of each adapter that are kept, 0 to 1"
SCOPE = "count the kept share over the whole adapter, or in each module"
SEED = "seed of the random draws"


def _density(default: float) -> Any:
    return field(default=default, metadata={"help": DENSITY})


def _choice(default: str, help_text: str, choices: tuple[str, ...]) -> Any:
    return field(default=default, metadata={"help": help_text, "choices": choices})


def _seed() -> Any:
    return field(default=0, metadata={"help": SEED})


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0.0 <= value <= 1.0


def _check_share(name: str, value: object) -> None:
    if not _is_share(value):
        raise UsageError(
            f"parameter '{name}' is out of range", where=name, got=repr(value), expected=f"0 <= {name} <= 1"
        )


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(
            f"parameter '{name}' has an unknown value", where=name, got=value, expected=" or ".join(choices)
        )


def _check_seed(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError("parameter 'seed' is not a whole number", where="seed", got=value, expected="a whole number")


SCOPES = ("global", "module")
RESCALES = ("inverse", "l1")


@dataclass(frozen=True)
class TrimParams:
    """Keeping the largest magnitudes: ties, magnitude-prune, knots-ties, core-ties."""

    density: float = _density(0.2)
    scope: str = _choice("global", SCOPE, SCOPES)

    def __post_init__(self) -> None:
        """Checks every field."""
        _check_share("density", self.density)
        _check_choice("scope", self.scope, SCOPES)


@dataclass(frozen=True)
class DareParams:
    """Keeping entries at random and rescaling them: dare, dare-ties, core-dare."""

    density: float = _density(0.2)
    seed: int = _seed()

    def __post_init__(self) -> None:
        """Checks every field."""
        _check_share("density", self.density)
        _check_seed(self.seed)


@dataclass(frozen=True)
class DellaParams:
    """Keeping entries at random, larger ones more likely."""

    density: float = _density(0.2)
    epsilon: float = field(
        default=0.1,
        metadata={"help": "the smallest entry of a row is kept with density - epsilon, the largest with + epsilon"},
    )
    rescale: str = _choice(
        "inverse", "divide kept entries by their probability, or restore the l1 norm of the module", RESCALES
    )
    seed: int = _seed()

    def __post_init__(self) -> None:
        """Checks every field, and that every probability is one."""
        _check_share("density", self.density)
        _check_share("epsilon", self.epsilon)
        _check_choice("rescale", self.rescale, RESCALES)
        _check_seed(self.seed)
        # A rounding error of the sum of two decimals is no probability above 1.
        if self.density - self.epsilon < -1e-9 or self.density + self.epsilon > 1.0 + 1e-9:
            raise UsageError(
                "density - epsilon to density + epsilon are no probabilities",
                where="density, epsilon",
                got=f"density={self.density}, epsilon={self.epsilon}",
                expected="epsilon <= density and density + epsilon <= 1",
                hint=f"use --set epsilon={round(min(self.density, 1.0 - self.density), 6)} or less",
            )


@dataclass(frozen=True)
class BreadcrumbsParams:
    """Dropping the largest and the smallest magnitudes."""

    density: float = _density(0.9)
    gamma: float = field(default=0.01, metadata={"help": "share of the largest entries that are dropped, 0 to 1"})

    def __post_init__(self) -> None:
        """Checks every field, and that both shares fit."""
        _check_share("density", self.density)
        _check_share("gamma", self.gamma)
        if self.density + self.gamma > 1.0 + 1e-9:
            raise UsageError(
                "density and gamma are more than everything",
                where="density, gamma",
                got=f"density={self.density}, gamma={self.gamma}",
                expected="density + gamma <= 1",
                hint=f"use --set gamma={round(1.0 - self.density, 6)} or less",
            )
