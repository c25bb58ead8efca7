"""Passes of a subject's batches under gates, each begun at the lowest layer that differs.

Layers are to be the outer loop, batches the middle one, heads the inner one: what the layers below give is saved per
batch (`prefix`), and heads are complete layer by layer. Where a batch is small, several heads share a pass: the batch
is repeated, and each repetition has its own gates.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from types import TracebackType

import torch
from torch import Tensor

from loraforge.measure.heads.gates import HeadGates
from loraforge.measure.heads.trials import FAILURES
from loraforge.measure.importance.prefix import Call, Prefix, PrefixCache, Saved
from loraforge.measure.subjects.objectives import Objective, check_losses, repeat_reference
from loraforge.measure.subjects.subject import Subject

# Tokens a pass below which heads share it. Above them a pass is bound by arithmetic, and sharing gains nothing.
TOKENS_PER_PASS = {"cpu": 512, "cuda": 4096}
CACHE_BYTES = 2 * 2**30  # on the CPU
_SHARE = 0.5  # of a GPU's free memory
_SAME_ON_GPU = 1e-5  # relative; on the CPU a replayed pass is equal to the bit


class Passes:
    """Passes of a subject's batches with gates, each from the lowest layer that differs; to be entered once.

    Args:
        subject: Model and batches.
        objective: Gives the losses.
        tokens_per_pass: About how many tokens a pass should have; 1: a head a pass.
        cache_bytes: Bytes that may be kept of layers' outputs.
    """

    def __init__(
        self, subject: Subject, objective: Objective, *, tokens_per_pass: int | None = None,
        cache_bytes: int | None = None,
    ) -> None:  # fmt: skip
        self.model, self.layout, self.objective = subject.model, subject.layout, objective
        self.batches = subject.batches()
        self.device = torch.device(subject.device)
        self.tokens_per_pass = tokens_per_pass or TOKENS_PER_PASS.get(self.device.type, TOKENS_PER_PASS["cpu"])
        self.prefix = Prefix(subject.model, _layers(subject))
        self.limit = _limit(self.device) if cache_bytes is None else cache_bytes
        self.cache = PrefixCache(self.prefix, self.limit)
        self.gates = HeadGates(subject.model, subject.layout)
        self.base: list[Tensor] = []
        self.base_seconds = 0.0
        self.passes = 0
        self.why_whole: str | None = None
        self._calls: list[dict[str, Call]] = []
        self._references: dict[int, Tensor | None] = {}

    def __enter__(self) -> Passes:
        """Itself, with the losses of the plain passes in `base`: float64 on the CPU, a tensor (B,) a batch."""
        self.gates.__enter__()
        try:
            self._run_base()
        except BaseException:
            self.gates.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Takes the gates away."""
        self.gates.__exit__(kind, error, trace)

    @property
    def losses_base(self) -> Tensor:
        """(N,) float64, in the order of the batches."""
        return torch.cat(self.base)

    def _run_base(self) -> None:
        started = time.perf_counter()
        kept = 0
        for number, batch in enumerate(self.batches):
            with torch.no_grad(), self.prefix.watched() as calls:
                reference = self.objective.reference(self.model, batch)
            first = len(calls)
            with torch.no_grad(), self.prefix.watched() as calls:
                losses = self.objective.losses(self.model, batch, reference).double().cpu()
            self.passes += 1 + (first > 0)
            self._calls.append({call.layer: call for call in calls})
            if tuple(call.layer for call in calls) != self.prefix.order:
                self.why_whole = "batches run their layers in different orders"
            check_losses(losses, batch, number)
            self.base.append(losses)
            kept += 0 if reference is None else reference.numel() * reference.element_size()
            if kept <= self.limit:
                self._references[number] = reference
        if not self.prefix.is_regular:
            self.why_whole = "a pass does not run every layer exactly once"
        self.base_seconds = time.perf_counter() - started

    def reference(self, number: int) -> Tensor | None:
        """The objective's reference for a batch; made anew where it was too large to keep."""
        if number in self._references:
            return self._references[number]
        self.passes += 1
        with torch.no_grad():
            return self.objective.reference(self.model, self.batches[number])

    def below(self, block: str) -> int:
        """How many layers a pass may leave out that gates heads of this one."""
        return 0 if self.why_whole or not block else self.prefix.position(block)

    def start(self, number: int, block: str) -> tuple[Saved, Tensor | None]:
        """What the layers below `block` give for a batch, and the objective's reference."""
        batch, reference = self.batches[number], self.reference(number)
        self.gates.clear()
        with torch.no_grad():
            forward = partial(self.objective.losses, self.model, batch, reference)
            saved = self.cache.at(number, forward, self.below(block), len(batch))
        return saved, reference

    def losses(
        self, number: int, start: tuple[Saved, Tensor | None], attention: int, gate: Tensor, fill: Tensor | None = None
    ) -> Tensor:
        """Losses of a batch under gates, where its autograd mode is the caller's.

        Args:
            number: Of the batch.
            start: What `start` gave.
            attention: Index in the layout.
            gate: (n * B, n_q): the batch n times, with gates for each row.
            fill: What replaces a closed head, for the batch once; None for zero.

        Returns:
            (n * B,) in the objective's dtype, on the device.
        """
        batch, (saved, reference) = self.batches[number], start
        times = gate.shape[0] // saved.rows
        if fill is not None and fill.dim() == 3 and fill.shape[0] > 1 and times > 1:
            fill = fill.repeat(times, 1, 1)
        if times > 1:
            batch = batch.repeat(times)
            reference = repeat_reference(reference, times)
        self.gates.set(attention, gate, fill)
        try:
            with self.prefix.replayed(saved, times):
                self.passes += 1
                return self.objective.losses(self.model, batch, reference)
        finally:
            self.gates.clear()

    def times(self, number: int, block: str) -> int:
        """How many heads share a pass of a batch."""
        calls = self._calls[number]
        tokens = calls[block].tokens if block in calls else max((call.tokens for call in calls.values()), default=1)
        return max(1, self.tokens_per_pass // max(1, tokens))

    @property
    def expected_bytes(self) -> int:
        """What the outputs of one layer take for all batches, or the limit where that is less."""
        sizes = [sum(calls[name].nbytes for calls in self._calls if name in calls) for name in self.prefix.order]
        return 0 if self.why_whole else min(self.limit, max(sizes, default=0))

    def captured(self, block: str, attentions: Sequence[int]) -> Iterator[tuple[int, dict[int, Tensor]]]:
        """What goes into the output projections of a layer: batch by batch, (B, T, n_q * v) an attention."""
        for number, batch in enumerate(self.batches):
            saved, reference = self.start(number, block)
            self.passes += 1
            self.gates.record(*attentions)
            with torch.no_grad():
                if self.why_whole or not block:
                    self.objective.losses(self.model, batch, reference)
                else:
                    self.prefix.advance(
                        partial(self.objective.losses, self.model, batch, reference), saved.below + 1, saved.rows, saved
                    )
            yield number, {index: self.gates.capture(index) for index in attentions}

    def verify(self, block: str) -> None:
        """Looks whether the first batch's plain losses come out as in the whole pass; if not, no pass is shortened."""
        try:
            saved, reference = self.start(0, block)
            if saved.below == 0:
                return
            if not saved.is_by_rows:
                self.tokens_per_pass = 1  # nobody knows how its batch is repeated
            with torch.no_grad(), self.prefix.replayed(saved):
                self.passes += 1
                again = self.objective.losses(self.model, self.batches[0], reference).double().cpu()
            allowed = 0.0 if self.device.type == "cpu" else _SAME_ON_GPU
            if torch.allclose(again, self.base[0], rtol=allowed, atol=0.0):
                return
        except FAILURES:
            # What a layer misses that takes more from those below, as keys and values that layers share.
            if self.below(block) == 0:
                raise
        self.why_whole = f"the model uses more of the layers below {block} than the last one's output"
        warnings.warn(f"{self.why_whole}: every pass is run whole", stacklevel=2)


def _layers(subject: Subject) -> list[str]:
    return list(dict.fromkeys(attention.block for attention in subject.layout.attentions if attention.block))


def _limit(device: torch.device) -> int:
    if device.type != "cuda":
        return CACHE_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return int(_SHARE * free)
