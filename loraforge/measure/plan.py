"""The steps of a whole measurement: what decides each, and how it is done."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from loraforge.measure.analysis.aggregate import aggregate
from loraforge.measure.files import (
    CASES,
    FISHER,
    HEADS,
    IMPORTANCE,
    INITIAL,
    LAYOUT,
    PACKAGES,
    REPORT,
    SPECTRUM,
    STATS,
    UPDATE,
    write_json,
)  # fmt: skip
from loraforge.measure.importance.gradients import measure_fisher
from loraforge.measure.importance.measure import measure_importance
from loraforge.measure.initial import ABOUT, write_initial
from loraforge.measure.record import LORA, Trained
from loraforge.measure.settings import MeasureSettings
from loraforge.measure.steps import OF, Step
from loraforge.measure.subjects.subject import Subject, open_subject
from loraforge.measure.updates.paths import PATH, PATH_HEADS, measure_path
from loraforge.measure.updates.spectra import SPECTRUM_HEADS, measure_spectrum
from loraforge.measure.updates.update import measure_update
from loraforge.provenance import commit, digest_of, versions
from loraforge.tasks.rows import read_rows
from loraforge.tasks.spec import SPLITS

Progress = Callable[[str, str, int, int], None]
_PACKAGE = Path(__file__).resolve().parents[1]
_IMPORTANCE = ("method", "objective", "ablate", "unit", "layers", "max_heads", "exact_top", "probe_steps")
_DOCUMENT_PICTURES = ("fig_I_vs_U", "fig_I_vs_G", "fig_stats", "fig_Ipre_vs_Ipost", "fig_Ipost_corrs")
_PASSES = ("profile", "batch_size", "dtype", "device")


class Plan:
    """The steps of one measurement and what they share.

    Args:
        trained: What is measured.
        settings: How.
        indices: On which rows.
        norms: File in which norms of the base are kept for further runs.
        progress: Called with (stage, detail, done, total).
    """

    def __init__(
        self,
        trained: Trained,
        settings: MeasureSettings,
        indices: Sequence[int],
        *,
        norms: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.trained = trained
        self.settings = settings
        self.norms = norms
        self.progress = progress
        self.warnings: list[str] = []
        self.indices = list(indices)
        self._open: tuple[str, Subject] | None = None

    def about(self, command: str | None = None) -> dict[str, Any]:
        """What run_config.json says beside facts and steps; nothing that differs between equal runs."""
        t, record = self.trained, self.trained.record
        lora: Mapping[str, Any] = record.get("lora") or {}
        metrics: Mapping[str, Any] = record.get("metrics") or {}
        return {
            "method": t.method, "task": t.task.id, "kind": t.kind, "seed": t.seed, "rank": t.rank, "r": t.rank,
            "alpha": lora.get("alpha"), "rslora": lora.get("rslora"), "labels": list(t.labels),
            "base": t.base, "final": str(t.final), "profile": self.settings.profile, "command": command,
            "base_sha256": t.base_sha256, "final_sha256": t.final_sha256, "data": dict(t.data),
            "subset": {"n": len(self.indices), "seed": self.settings.subset_seed, "sha256": digest_of(self.indices)},
            "measure": self.settings.record(), "train": record.get("train"), "lora": dict(lora) or None,
            "metrics": {split: found["metrics"] for split, found in metrics.items()},
            "versions": versions(*PACKAGES), "commit": commit(),
        }  # fmt: skip

    def close(self) -> None:
        """Lets go of the model."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def steps(self) -> list[Step]:
        """All steps, in order."""
        t, s = self.trained, self.settings
        start = {"base_sha256": t.base_sha256, "seed": t.seed, "labels": list(t.labels), "kind": t.kind}
        ends = {"base_sha256": t.base_sha256, "final_sha256": t.final_sha256}
        task = {name: getattr(t.task, name) for name in t.task.__slots__ if name not in (*SPLITS, "overrides", "rows")}
        rows = {"data_sha256": t.data["sha256"], "rows": digest_of(self.indices), "task": digest_of(task)}
        if s.objective == "probe":
            rows["train_sha256"] = read_rows(t.task, "train").sha256
        passes = rows | {name: getattr(s, name) for name in _PASSES}
        importance = passes | {name: getattr(s, name) for name in _IMPORTANCE}
        fisher = passes | {"objective": s.objective, "probe_steps": s.probe_steps}
        found = [
            *self._initial(start),
            self._layout(start),
            Step("importance_pre", _lines(IMPORTANCE["pre"]), start | importance, lambda: self._importance("pre"),
                 shared=True),
            Step("gradfisher_pre", _lines(FISHER), start | fisher, self._fisher, shared=True),
            Step("update", _lines(UPDATE), ends | {"profile": s.profile}, self._update),
            Step("importance_post", _lines(IMPORTANCE["post"]), start | ends | importance,
                 lambda: self._importance("post")),
        ]  # fmt: skip
        if s.spectrum if s.spectrum is not None else t.method == LORA and not s.is_document:
            found.append(Step("spectrum", (SPECTRUM_HEADS, *_lines(SPECTRUM)), ends, self._spectrum))
        if t.snapshots is not None and not s.is_document:
            found.append(Step("path", (PATH_HEADS, PATH), ends, partial(self._path, t.snapshots)))
        made = {step.name: digest_of(step.settings) for step in found}
        shown = {"profile": s.profile, "topk": s.topk, "hi": s.hi, "lo": s.lo, OF: made}
        found.append(Step("aggregate", (HEADS, CASES, STATS), shown, self._aggregate))
        return [*found, *([Step("report", (REPORT,), shown, self._report)] if s.plots else [])]

    def _initial(self, start: dict[str, Any]) -> list[Step]:
        """theta0 as a folder; none to make where the training started from that very folder."""
        t, whole = self.trained, self.settings.is_document
        folder = t.out / INITIAL
        if Path(t.base).resolve() == folder.resolve():
            return []
        name = f"{INITIAL}/config.json" if whole else f"{INITIAL}/{ABOUT}"
        action = partial(write_initial, folder, t, whole=whole)
        return [Step(INITIAL, (name, INITIAL), start | {"whole": whole}, action, facts=("theta0_sha256",))]

    def _layout(self, start: dict[str, Any]) -> Step:
        """The heads; the document has no file of them."""

        def action() -> Mapping[str, Any]:
            subject = self._subject("pre")
            if not self.settings.is_document:
                write_json(self.trained.out / LAYOUT, subject.layout.to_json())
            return {"layout_sha256": subject.layout.sha256, "theta0_sha256": subject.record["theta0_sha256"]}

        outputs = () if self.settings.is_document else (LAYOUT,)
        # Without a folder of its own theta0 is known by its digest alone.
        facts = ("layout_sha256",) if self._initial(start) else ("layout_sha256", "theta0_sha256")
        return Step("layout", outputs, {"base_sha256": start["base_sha256"]}, action, facts=facts)

    def _subject(self, phase: str) -> Subject:
        """theta0 (`pre`) or theta1 (`post`, an adapter unmerged), one of them at a time."""
        if self._open is not None and self._open[0] == phase:
            return self._open[1]
        self.close()
        t, s = self.trained, self.settings
        whole = phase == "post" and t.method != LORA
        found = open_subject(
            t.final if whole else t.base, adapter=t.final if phase == "post" and not whole else None, task=t.task,
            split=t.split, subset=self.indices, subset_seed=s.subset_seed, dtype=s.dtype, device=s.device, seed=t.seed,
            labels=t.labels or None, batch_size=s.batch_size, order=s.order,
        )  # fmt: skip
        self._open = phase, found
        return found

    def _importance(self, phase: str) -> Mapping[str, Any]:
        s = self.settings
        options = {name: getattr(s, name) for name in _IMPORTANCE}
        with self._heard():
            measure_importance(
                self._subject(phase), **options, tokens_per_pass=s.tokens_per_pass, phase=phase, profile=s.profile,
                out=self.trained.out / IMPORTANCE[phase], progress=self._named(f"importance {phase}"),
            )  # fmt: skip
        return {}

    def _fisher(self) -> Mapping[str, Any]:
        s = self.settings
        # The divergence from the model itself has no gradient at open gates.
        objective = "task" if s.objective == "kl" else s.objective
        with self._heard():
            measure_fisher(
                self._subject("pre"), objective=objective, probe_steps=s.probe_steps, out=self.trained.out / FISHER,
                profile=s.profile, progress=self._named("fisher pre"),
            )  # fmt: skip
        return {}

    def _update(self) -> Mapping[str, Any]:
        t, s = self.trained, self.settings
        return measure_update(
            t.base, **self._ends(), out=t.out / UPDATE, norm="document" if s.is_document else "l2", profile=s.profile,
            cache=self.norms, base_sha256=t.base_sha256, progress=self._named("update"),
        )  # fmt: skip

    def _spectrum(self) -> Mapping[str, Any]:
        return measure_spectrum(
            self.trained.base, **self._ends(), out=self.trained.out / SPECTRUM, progress=self._named("spectrum")
        )

    def _path(self, snapshots: Path) -> Mapping[str, Any]:
        return measure_path(snapshots, base=self.trained.base, out=self.trained.out / PATH)

    def _ends(self) -> dict[str, Any]:
        t = self.trained
        return {"adapter": t.final} if t.method == LORA else {"final": t.final}

    def _aggregate(self) -> Mapping[str, Any]:
        s = self.settings
        return aggregate(self.trained.out, topk=s.topk, hi=s.hi, lo=s.lo, profile=s.profile)

    def _report(self) -> Mapping[str, Any]:
        """Pictures, which are all that needs the plotting library, and page; the document's alone in its profile."""
        from loraforge.measure.analysis.content import run_content
        from loraforge.report.heads import write_run_report

        written = write_run_report(self.trained.out, run_content(self.trained.out))
        for path in written if self.settings.is_document else []:
            if path.suffix == ".png" and path.stem not in _DOCUMENT_PICTURES:
                path.unlink()
        return {}

    @contextmanager
    def _heard(self) -> Iterator[None]:
        """Keeps the program's own warnings, each once, for the result; those of libraries go on."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        for entry in caught:
            if _PACKAGE not in Path(entry.filename).parents:
                warnings.warn_explicit(entry.message, entry.category, entry.filename, entry.lineno)
            elif str(entry.message) not in self.warnings:
                self.warnings.append(str(entry.message))

    def _named(self, stage: str) -> Progress | None:
        """Progress under the step's name."""
        progress = self.progress
        if progress is None:
            return None
        return lambda inner, detail, done, total: progress(stage, f"{inner} {detail}".strip(), done, total)


def _lines(name: str) -> tuple[str, ...]:
    """A file of lines behind the one that says how it was made."""
    return f"{Path(name).stem}.meta.json", name
