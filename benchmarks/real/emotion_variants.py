"""What the emotion benchmark compares: named merges of the three adapters, each a method with its settings."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emotion_data import REPOSITORY, TASKS

from loraforge.recipes import load_recipe

SAMPLES = (16, 64, 256)
SEEDS = (0, 1, 2)
REFERENCE = "weighted-average"
DOCUMENT = load_recipe("document")["params"]
SWITCHES = {"mats": "use_mats", "camr": "use_camr", "dcs": "use_dcs"}


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        name: Its label.
        method: Method of the library.
        params: Settings that differ from the method's defaults.
        weight: w_i of every adapter; None for the method's default.
        rank: Output rank; None for the method's default.
    """

    name: str
    method: str
    params: Mapping[str, Any] = field(default_factory=dict)
    weight: float | None = None
    rank: int | None = None

    @property
    def weights(self) -> list[float] | None:
        """w_i, one an adapter."""
        return None if self.weight is None else [self.weight] * len(TASKS)

    @property
    def calibrated(self) -> bool:
        """Whether the method reads calibration samples (otherwise one run serves all sample sizes)."""
        from loraforge.merging.methods import find_method

        return find_method(self.method).needs == "calibration"

    def settings(self) -> dict[str, Any]:
        """Everything that decides the result, with the method's defaults filled in.

        Two variants with equal settings (a switch set to its default) share one cached result.
        """
        from loraforge.merging.methods import find_method

        resolved = dataclasses.asdict(find_method(self.method).make_params(self.params))
        return {"method": self.method, "params": resolved, "weights": self.weights, "rank": self.rank}

    def settings_hash(self) -> str:
        """Short hash of settings()."""
        return hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()[:10]


def standard_variants() -> list[Variant]:
    """The merges of the published table, in its order."""
    rows = [Variant(REFERENCE, "weighted-average")]
    rows += [Variant(f"task-arithmetic {w:g}", "task-arithmetic", weight=w) for w in (0.3, 0.5, 1.0)]
    rows += [Variant("svd", "svd", weight=1.0)]
    rows += [Variant(name, name) for name in ("regmean", "regmean-plus-plus", "iteris", "iteris-plus")]
    rows += [Variant("iteris-plus document", "iteris-plus", DOCUMENT)]
    for label, switch in SWITCHES.items():
        rows += [Variant(f"iteris-plus {word}-{label}", "iteris-plus", {switch: on}) for word, on in _ON_OFF]
    return rows


_ON_OFF = (("no", False), ("with", True))


def extra_variants(text: str | None) -> list[Variant]:
    """Exploratory merges from JSON {label: settings} (or @FILE of it).

    Settings are parameters of iteris-plus; the keys method, weight and rank choose another method and its arguments.
    """
    if not text:
        return []
    source = Path(text[1:]).read_text(encoding="utf-8") if text.startswith("@") else text
    out = []
    for name, given in json.loads(source).items():
        rest = dict(given)
        head = {key: rest.pop(key) for key in ("weight", "rank") if key in rest}
        out.append(Variant(name, rest.pop("method", "iteris-plus"), rest, **head))
    return out


def code_fingerprint() -> str:
    """Short hash of the library's source that decides a merge; a cached result of other code is computed again."""
    package = REPOSITORY / "loraforge"
    files = [package / "types.py"]
    for room in ("merging", "calibrate", "linalg", "kernels", "adapters"):
        files += sorted((package / room).rglob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:10]
