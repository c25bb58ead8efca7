"""Importance of heads: exact ablation and its estimates by gradients; one line a head, taken up where it broke off.

I = mean over samples of [loss with the head's gate closed - loss with all gates open]. Above 0 the head helps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError
from loraforge.evaluation.batches import Progress
from loraforge.measure.files import PACKAGES, LineLog, key_of, write_json
from loraforge.measure.heads.layout import HeadKey
from loraforge.measure.importance.ablation import make_fills
from loraforge.measure.importance.choice import Unit, read_layers, units_of
from loraforge.measure.importance.exact import count_passes, estimated_seconds, exact_differences
from loraforge.measure.importance.gradients import gate_gradients
from loraforge.measure.importance.integrated import POINTS, integrated_differences
from loraforge.measure.importance.lines import importance_line
from loraforge.measure.importance.noise import noise_floor
from loraforge.measure.importance.passes import Passes
from loraforge.measure.importance.screen import chosen_for_exact, reliability
from loraforge.measure.importance.settings import DOCUMENT_BATCH, DOCUMENT_KEYS, EXACT_TOP, ImportanceSettings
from loraforge.measure.subjects.objectives import Objective, make_objective
from loraforge.measure.subjects.subject import Subject
from loraforge.provenance import digest_of, versions

Tell = Callable[[str], None]


def measure_importance(
    subject: Subject,
    *,
    method: str = "exact",
    objective: str = "task",
    ablate: str = "zero",
    unit: str = "q",
    layers: Collection[int] | str | None = None,
    max_heads: int | None = None,
    exact_top: int | None = None,
    tokens_per_pass: int | None = None,
    cache_bytes: int | None = None,
    probe_steps: int = 200,
    seed: int = 0,
    out: str | Path | None = None,
    overwrite: bool = False,
    profile: str = "default",
    phase: str | None = None,
    progress: Progress | None = None,
    tell: Tell | None = None,
) -> list[dict[str, Any]]:
    """Measures how much the loss depends on each head.

    Methods: `exact` closes one gate at a time. `taylor` is its first-order estimate -mean_i dl_i/dg_h of all heads from
    one backward pass, `michel` mean_i |dl_i/dg_h| (Michel et al. 2019), without sign. `screen` is taylor for all, exact
    for the first and some others, on which taylor is checked. `integrated` integrates the gradient, equal to exact.

    Args:
        subject: Model and batches.
        method: One of METHODS.
        objective: task | probe | kl | lm; see `make_objective`.
        ablate: What takes a closed head's place: zero | mean | resample; see `make_fills`.
        unit: "q": each query head; "kv": all query heads of a key-value head together, a line under the first of them.
        layers: Numbers of layers, or text as `0-5,7`; None for all.
        max_heads: At most so many heads, drawn with `seed`.
        exact_top: For `screen`: how many heads are ablated (default 20), with a quarter as many others.
        tokens_per_pass: About how many tokens a pass should have where heads share it; 1: a head a pass.
        cache_bytes: Bytes of layers' outputs that may be kept; default 2 GiB, on a GPU half of the free memory.
        probe_steps: Steps of the head of `probe`.
        seed: Of every draw.
        out: File of lines to write, with FILE.meta.json beside it; what a broken-off run left is taken up.
        overwrite: Replace that file.
        profile: `document`: batches of 16 in the order of the subset, a head a pass, the document's keys.
        phase: `pre` or `post`, for the record.
        progress: Called with (stage, detail, done, total).
        tell: Called with the line that says what the measurement will take.

    Returns:
        A line a head, in the layout's order: {layer, head, I, loss_base, loss_ablate, n, se, ci_lo, ci_hi, significant,
        stack, kind, method, objective, ablate, unit}. se is that of the paired differences, the interval the normal one
        of 95 %; `significant`: it excludes 0 (null for michel, which cannot be 0).

    Raises:
        UsageError: Unknown or contradicting choices.
        LoraforgeError: The output exists, or another run writes it; an objective that does not fit.
        CheckFailed: A loss that is not finite.
    """
    chosen = read_layers(layers) if isinstance(layers, str) else None if layers is None else sorted(set(layers))
    exact_top = EXACT_TOP if method == "screen" and exact_top is None else exact_top
    asked = ImportanceSettings(
        method, objective, ablate, unit, chosen, max_heads, exact_top, 1 if profile == "document" else tokens_per_pass,
        probe_steps, seed, profile,
    )  # fmt: skip
    path = None if out is None else Path(out)
    if path is not None and path.exists() and not overwrite:
        raise LoraforgeError("the output exists", where=path, hint="choose another path, or add --overwrite")
    if profile == "document":
        if not subject.layout.is_plain:
            raise LoraforgeError("layer and head alone do not name this model's heads", where="--profile document",
                                 got=subject.layout.family, hint="--profile default")  # fmt: skip
        subject = replace(subject, batch_size=DOCUMENT_BATCH, order="given")
    with ExitStack() as held:
        work = _Measurement(subject, asked, path, cache_bytes, progress, tell, held)
        lines = work.run()
        if profile == "document":
            lines = [{key: line[key] for key in DOCUMENT_KEYS} for line in lines]
        if work.log is not None and path is not None:
            write_json(path.with_name(f"{path.stem}.meta.json"), {"phase": phase, **work.about()})
            work.log.finish(lines)
        return lines


class _Measurement:
    """One measurement: what it is of, its lines so far, and what is told of it afterwards."""

    def __init__(
        self,
        subject: Subject,
        asked: ImportanceSettings,
        path: Path | None,
        cache_bytes: int | None,
        progress: Progress | None,
        tell: Tell | None,
        held: ExitStack,
    ) -> None:
        self.subject, self.asked, self.progress, self.tell = subject, asked, progress, tell
        self.cache_bytes = cache_bytes
        self.units = units_of(
            subject.layout, asked.unit, layers=asked.layers, max_heads=asked.max_heads, seed=asked.seed
        )
        self.started = time.perf_counter()
        self.told: dict[str, Any] = {}
        self.log: LineLog | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.log = held.enter_context(LineLog(path, self.settings()))
            self.told["heads_taken_up"] = len(self.log.done)

    def settings(self) -> dict[str, Any]:
        """All that the lines depend on."""
        subject = self.subject
        batches = {"batch_size": subject.batch_size, "order": subject.order, "rows_sha256": digest_of(subject.indices)}
        return {
            **asdict(self.asked), **batches, "subject": subject.record, "layout_sha256": subject.layout.sha256,
            "versions": versions(*PACKAGES),
        }  # fmt: skip

    def run(self) -> list[dict[str, Any]]:
        """The lines, in the layout's order."""
        asked = self.asked
        done = {} if self.log is None else {key_of(line): line for line in self.log.lines}
        if self.units and done.keys() >= {unit.key for unit in self.units}:
            return [done[unit.key] for unit in self.units]
        objective = make_objective(asked.objective, self.subject, probe_steps=asked.probe_steps, seed=asked.seed)
        self.told["objective"] = objective.record
        found: dict[HeadKey, dict[str, Any]] = {}
        units = self.units
        if asked.method in ("taylor", "michel", "screen"):
            found = self._estimates(objective)
        if asked.exact_top is not None:
            estimate = {key: line["I"] for key, line in found.items()}
            top, others = chosen_for_exact(units, estimate, asked.exact_top, asked.seed)
            units = [unit for unit in units if unit in top or unit in others]
        if asked.method in ("exact", "screen", "integrated"):
            found |= self._ablations(objective, units, done)
        if asked.exact_top is not None:
            judged = reliability(others, estimate, {unit.key: found[unit.key]["I"] for unit in others})
            self.told["screening"] = {"exact_top": asked.exact_top, **judged}
            self._say(f"gradients against ablation on {judged['heads']} other heads: Spearman {judged['spearman']}")
        return [found[unit.key] for unit in self.units]

    def _estimates(self, objective: Objective) -> dict[HeadKey, dict[str, Any]]:
        """Lines by gradients of the gates."""
        keys = [unit.key._replace(head=head) for unit in self.units for head in unit.heads]
        gradients = gate_gradients(self.subject, objective, keys=keys, progress=self.progress)
        column = {key: at for at, key in enumerate(gradients.heads)}
        slopes, base = torch.as_tensor(gradients.s), torch.as_tensor(gradients.losses)
        self._note_floor(objective, self.subject.indices, base)
        michel = self.asked.method == "michel"
        found = {}
        for unit in self.units:
            heads = [column[unit.key._replace(head=head)] for head in unit.heads]
            slope = slopes[:, heads].sum(1)
            values = slope.abs() if michel else -slope
            found[unit.key] = importance_line(unit, values, base, "michel" if michel else "taylor", self.asked)
        return found

    def _ablations(
        self, objective: Objective, units: Sequence[Unit], done: Mapping[HeadKey, dict[str, Any]]
    ) -> dict[HeadKey, dict[str, Any]]:
        """Lines by closing gates; whole layers that are in the log already are not run again."""
        asked, found = self.asked, {unit.key: done[unit.key] for unit in units if unit.key in done}
        passes = Passes(self.subject, objective, tokens_per_pass=asked.tokens_per_pass, cache_bytes=self.cache_bytes)
        fills = make_fills(asked.ablate, self.subject, asked.seed)
        with passes:
            base = passes.losses_base
            if asked.method != "screen":
                self._note_floor(objective, [row for batch in passes.batches for row in batch.indices], base)
            # Heads that share passes have to do so again, so that their numbers are the same to the last bit.
            blocks = self.subject.layout.attentions
            missing = {blocks[unit.attention].block for unit in units if unit.key not in done}
            left = [unit for unit in units if blocks[unit.attention].block in missing]
            self._say_budget(passes, left)
            method = "integrated" if asked.method == "integrated" else "exact"
            ablate = integrated_differences if method == "integrated" else exact_differences
            for unit, values in ablate(passes, left, fills, self.progress):
                if unit.key not in found:
                    found[unit.key] = importance_line(unit, values, base, method, asked)
                    if self.log is not None:
                        self.log.add(found[unit.key])
            self._note_passes(passes)
        return found

    def _say_budget(self, passes: Passes, units: Sequence[Unit]) -> None:
        count, seconds = count_passes(passes, units), estimated_seconds(passes, units)
        if self.asked.method == "integrated":
            count, seconds = count * POINTS, seconds * POINTS * 3.0
        size = passes.expected_bytes
        self.told["budget"] = {"passes": count, "cache_bytes": size, "seconds": seconds}
        self._say(
            f"{len(units)} heads on {len(passes.losses_base)} rows: {count} passes, at most {size / 2**20:.1f} MiB of "
            f"layers' outputs kept, about {seconds:.3g} s"
        )

    def _say(self, text: str) -> None:
        if self.tell is not None:
            self.tell(text)

    def _note_floor(self, objective: Objective, rows: Sequence[int], base: Tensor) -> None:
        losses = dict(zip(rows, base.tolist(), strict=True))
        self.told["noise_floor"] = noise_floor(self.subject, objective, losses, self.asked.seed)

    def _note_passes(self, passes: Passes) -> None:
        self.told["passes"] = {
            "count": passes.passes, "base_seconds": passes.base_seconds, "tokens_per_pass": passes.tokens_per_pass,
            "whole_because": passes.why_whole, "cache_bytes": passes.cache.most_bytes, "cache_limit": passes.limit,
            "runs_from_embeddings": passes.cache.rerun,
        }  # fmt: skip

    def about(self) -> dict[str, Any]:
        """What is written beside the lines."""
        return self.settings() | self.told | {"heads": len(self.units), "seconds": time.perf_counter() - self.started}
