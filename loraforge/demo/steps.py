"""The steps of a demo: base, one adapter a domain, merges, measurements."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import ViTForImageClassification

import loraforge
from loraforge.demo.digits import DOMAINS, Domain, Split, as_pixels, load_splits
from loraforge.demo.evaluation import accuracy, adapter_accuracies, weight_bytes
from loraforge.demo.training import Recipe, build_base, train_adapter, train_base

Progress = Callable[[str, str, int, int], None]


class Phases:
    """Seconds by phase, and the caller's progress callback."""

    def __init__(self, progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextlib.contextmanager
    def of(self, phase: str, detail: str = "", done: int = 0, total: int = 1) -> Iterator[None]:
        """Times a step and adds it to its phase; reports before and after it."""
        self._say(phase, detail, done, total)
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
        self._say(phase, detail, done + 1, total)

    def _say(self, phase: str, detail: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(phase, detail, done, total)


class DemoRun:
    """One run: `work` is the folder it is built in, `final` the name that the folder gets when it is whole."""

    kind = "adapters"

    def __init__(self, work: Path, final: Path, recipe: Recipe, seed: int, phases: Phases) -> None:
        self.work, self.final, self.recipe, self.seed, self.phases = work, final, recipe, seed, phases
        self.domains: tuple[Domain, ...] = DOMAINS[: recipe.domains]
        train, test = load_splits(seed)
        self.train, self.test = train.head(recipe.train), test.head(recipe.test)
        self.tests: dict[str, Split] = {d.name: as_pixels(self.test, d, seed=seed, part="test") for d in self.domains}

    def results(self, methods: dict[str, Any]) -> dict[str, Any]:
        """All phases but the report."""
        base, plain = self._base()
        single = self.train_inputs(base)
        with self.phases.of("measure", "base"):
            rows = [self.row("base", "base", {name: accuracy(base, split) for name, split in self.tests.items()})]
        size = sum(weight_bytes(self.work / self.kind / name) for name in self.tests)
        trained = self.phases.seconds[f"train {self.kind}"]
        rank = self.recipe.rank if self.kind == "adapters" else None
        rows.append(self.row(f"separate {self.kind}", "adapter", single, seconds=trained, bytes=size, rank=rank))
        reports: dict[str, Any] = {}
        for i, (name, method) in enumerate(methods.items()):
            with self.phases.of("merge", name, i, len(methods)):
                row, reports[name] = self.merge(base, name, method.needs)
                rows.append(row)
        return {
            "tasks": list(self.tests),
            "inputs": self.kind,
            "notes": {d.name: d.what for d in self.domains},
            "rows": rows,
            "reports": reports,
            "plain_accuracy": plain,
            "sizes": {"train": len(self.train), "test": len(self.test), "calibration": self.recipe.calibration},
        }

    def broaden(self, base: ViTForImageClassification) -> None:
        """More training of the base than plain digits; none here."""

    def _base(self) -> tuple[ViTForImageClassification, float]:
        with self.phases.of("train base"):
            base = build_base(self.recipe, self.seed)
            train_base(base, as_pixels(self.train), self.recipe, self.seed)
            self.broaden(base)
            base.save_pretrained(str(self.work / "base"))
            # From here on the saved base is used, the one that a merge and a user of the folder see.
            saved = ViTForImageClassification.from_pretrained(str(self.work / "base"), local_files_only=True).eval()
            # PEFT notes this name as the adapters' base; it must still be right after the folder is renamed.
            saved.name_or_path = str((self.final / "base").absolute())
            return saved, accuracy(saved, as_pixels(self.test))

    def train_inputs(self, base: ViTForImageClassification) -> dict[str, float]:
        """Trains, saves and measures each adapter on its own domain; writes the calibration files."""
        single: dict[str, float] = {}
        (self.work / "calibration").mkdir(parents=True)
        for i, domain in enumerate(self.domains):
            folder = self.work / "adapters" / domain.name
            with self.phases.of("train adapters", domain.name, i, len(self.domains)):
                split = as_pixels(self.train, domain, seed=self.seed)
                train_adapter(base, split, self.recipe, self.seed + 1 + i, folder)
                pixels = split.head(self.recipe.calibration).images.contiguous()
                save_file({"pixel_values": pixels}, self.work / "calibration" / f"{domain.name}.safetensors")
            with self.phases.of("measure", domain.name):
                single |= adapter_accuracies(base, folder, {domain.name: self.tests[domain.name]})
        return single

    def merge(self, base: ViTForImageClassification, name: str, needs: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Merges the adapters by one method and measures what was written."""
        folder = self.work / "merged" / name
        given: dict[str, Any] = {}
        if needs == "calibration":
            files = {task: str(self.work / "calibration" / f"{task}.safetensors") for task in self.tests}
            given = {"base": str(self.work / "base"), "calibration": files, "samples": self.recipe.calibration}
        start = time.perf_counter()
        adapters = [str(self.work / "adapters" / task) for task in self.tests]
        merged = loraforge.merge(adapters, method=name, seed=self.seed, **given)
        merged.save(folder)
        seconds = time.perf_counter() - start
        found = adapter_accuracies(base, folder, self.tests)
        size, rank = weight_bytes(folder), merged.report.get("rank_max")
        row = self.row(name, "merge", found, seconds=seconds, bytes=size, rank=rank, needs=needs)
        return row, relative(merged.report, self.work)

    def row(self, name: str, kind: str, found: dict[str, float], **extra: Any) -> dict[str, Any]:
        """A row of the table of results."""
        values = [found[task] for task in self.tests]
        empty = {"seconds": 0.0, "bytes": 0, "rank": None, "needs": None}
        row = {"name": name, "kind": kind, "accuracies": values, "mean": sum(values) / len(values)}
        return row | empty | extra


def relative(value: Any, folder: Path) -> Any:
    """The report with paths below the demo's folder, which is renamed once it is whole."""
    if isinstance(value, dict):
        return {key: relative(item, folder) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [relative(item, folder) for item in value]
    return value.replace(f"{folder}{os.sep}", "") if isinstance(value, str) else value
