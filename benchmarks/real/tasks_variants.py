"""What the six-task benchmark compares: merges of the adapters of some tasks, each a method with its settings."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks_data import REPOSITORY, TASKS

from loraforge.merging.methods import METHODS, find_method
from loraforge.recipes import load_recipe

REFERENCE = "weighted-average"
SEEDS = (0, 1, 2)
SAMPLES = 64  # calibration texts a task
SUM_WEIGHT = 0.3  # of every adapter, where a method adds them up
# The tasks that a merge of 2, 3, 4, 5 takes: the first of these, chosen before any merge so that kinds alternate.
ORDER = ("emoint", "sst2", "isear", "subj", "emotion-cause", "irony")
ABLATED = 3  # so many of them
DOCUMENT = load_recipe("document")["params"]
ISO = ("iso-c", "iso-cts", "iso-iasad")


@dataclass(frozen=True)
class Variant:
    """One row of a table.

    Attributes:
        name: Its label.
        method: Method of the library.
        params: Settings that differ from the method's defaults.
        weight: w_i of every adapter; None for the method's default.
        tasks: Tasks whose adapters are merged.
    """

    name: str
    method: str
    params: Mapping[str, Any] = field(default_factory=dict)
    weight: float | None = None
    tasks: tuple[str, ...] = TASKS

    @property
    def calibrated(self) -> bool:
        """Whether the method reads calibration texts."""
        return find_method(self.method).needs == "calibration"

    @property
    def with_stats(self) -> bool:
        """Whether the method reads input statistics."""
        return find_method(self.method).stats is not None

    def settings(self) -> dict[str, Any]:
        """Everything that decides the result, with the method's defaults filled in."""
        resolved = dataclasses.asdict(find_method(self.method).make_params(self.params))
        samples = SAMPLES if self.calibrated or self.with_stats else None
        found = {"method": self.method, "params": resolved, "weight": self.weight, "tasks": self.tasks}
        return found | {"samples": samples}

    @property
    def key(self) -> str:
        """File name: the method and a short hash of the settings."""
        digest = hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()[:10]
        return f"{self.method}-{len(self.tasks)}-{digest}"


def six_variants() -> list[Variant]:
    """Every method that takes six adapters.

    Sums get weight 0.3 an adapter (a sum of six whole deltas is far too strong), the isotropic family, whose strength
    also grows with the sum, both 0.3 and its default; `task-arithmetic` also 1, to show what that does. Settings were
    written down before the first merge and are not tuned.
    """
    rows = [Variant(REFERENCE, REFERENCE), Variant("task-arithmetic 1", "task-arithmetic")]
    for name, row in METHODS.items():
        if name == REFERENCE or row.needs == "calibration" or (row.counts[1] or len(TASKS)) < len(TASKS):
            continue
        if name in ISO or row.identical != "sum":
            rows.append(Variant(name, name))
        if name in ISO or row.identical == "sum":
            rows.append(Variant(f"{name} {SUM_WEIGHT:g}", name, weight=SUM_WEIGHT))
    return rows + [Variant(name, name) for name in ("regmean", "regmean-plus-plus", "iteris-plus", "iteris")]


def ablation_variants() -> list[Variant]:
    """`iteris-plus` with each switch turned round, all on, and the document's settings with each switch off.

    By default MATS is on, CAMR and DCS are off. Over the first tasks of ORDER: the document's iteration takes minutes
    for all six.
    """
    switches = {"MATS": "use_mats", "CAMR": "use_camr", "DCS": "use_dcs"}
    rows = [Variant("default", "iteris-plus")]
    rows += [
        Variant(f"{label} {'on' if on else 'off'}", "iteris-plus", {switches[label]: on})
        for label, on in (("MATS", False), ("CAMR", True), ("DCS", True))
    ]
    rows.append(Variant("all three on", "iteris-plus", dict.fromkeys(switches.values(), True)))
    rows.append(Variant("document", "iteris-plus", DOCUMENT))
    for label, switch in switches.items():
        rows.append(Variant(f"document, {label} off", "iteris-plus", {**DOCUMENT, switch: False}))
    return [dataclasses.replace(row, tasks=ORDER[:ABLATED]) for row in (Variant(REFERENCE, REFERENCE), *rows)]


def count_variants(leading: list[Variant]) -> list[Variant]:
    """The reference and the given merges over the first 2, 3, 4 and 5 tasks of ORDER; `slerp` takes two."""
    rows = []
    for count in range(2, len(TASKS)):
        tasks = ORDER[:count]
        rows += [dataclasses.replace(v, tasks=tasks) for v in (Variant(REFERENCE, REFERENCE), *leading)]
        if count == 2:
            rows.append(Variant("slerp", "slerp", tasks=tasks))
    return rows


def code_fingerprint() -> str:
    """Short hash of the library's source that decides a merge; a cached result of other code is computed again."""
    package = REPOSITORY / "loraforge"
    files = [package / "types.py"]
    for room in ("merging", "calibrate", "linalg", "kernels", "adapters"):
        files += sorted((package / room).rglob("*.py"))
    return hash_files(files)


def hash_files(files: list[Path]) -> str:
    """Short hash of the contents."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:10]
