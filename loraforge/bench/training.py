"""Continual training: the moving average, the switch between adapters, the replay buffer, and a whole step.

The average of 448 tensors beside a loop over them: by names and out of place, as training scripts have it
("reference"), and in place ("torch"). A draw from the buffer beside a list of 64-bit rows. A step of I-LORA beside a
step of plain replay of the same rows, forward to optimiser, in the same trainer.

What is compared: averages with float64; drawn rows with those that were offered, to the bit; the first loss of I-LORA
with that of plain replay, which it equals as long as both adapters are copies of each other.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loraforge.bench import training_steps
from loraforge.bench.cases import Case, Draws, Work, error_of
from loraforge.bench.session import Session
from loraforge.bench.timing import interleave
from loraforge.training.ilora.buffer import ReplayBuffer
from loraforge.training.ilora.ema import EmaPairs, Pair, update_ema

BUDGET = {"default": 0.6, "full": 3.0, "tiny": 0.0}
WEIGHT = 0.25
# (tensors, rows, columns): adapters of rank 16 at a width of 4096, of rank 8 at 384
_AVERAGES = {
    "tiny": ((6, 2, 5),),
    "default": ((448, 16, 4096), (448, 8, 384)),
    "full": ((448, 16, 4096), (448, 8, 384), (448, 64, 4096)),
}
# (rows, tokens, rows of a draw)
_BUFFERS = {"tiny": (12, 7, 3), "default": (500, 1024, 8), "full": (500, 1024, 8)}
_VOCABULARY = 32_000
_FLOAT32 = 1e-6  # one product and one sum in float32


def measure(session: Session) -> None:
    """Measures the group `train`."""
    averages = _AVERAGES[session.size]
    total = len(averages) + 2
    for done, sizes in enumerate(averages):
        session.tell("train", "average", done, total)
        session.measure("train", average_case(*sizes), BUDGET[session.size])
    session.tell("train", "buffer", total - 2, total)
    measure_buffer(session, *_BUFFERS[session.size])
    session.tell("train", "step", total - 1, total)
    training_steps.measure(session)


def average_case(tensors: int, rows: int, columns: int) -> Case:
    """One update of the average of so many tensors."""
    sizes = {"tensors": tensors, "rows": rows, "columns": columns}
    return Case("ema", f"{tensors} x {rows}x{columns}", sizes, partial(_average, tensors, rows, columns))


def _average(tensors: int, rows: int, columns: int, device: torch.device) -> Work:
    draws = Draws(device)
    start = [draws.normal(rows, columns) for _ in range(tensors)]
    new = [draws.normal(rows, columns) for _ in range(tensors)]
    sets = {form: _pairs(start, new) for form in ("loraforge", "reference", "torch")}
    laid = EmaPairs(sets["loraforge"])
    by_name = {pair.name: pair.plastic for pair in sets["reference"]}
    stable = {pair.name.replace("default", "ema"): pair.stable for pair in sets["reference"]}

    def stables(form: str) -> list[Tensor]:
        return [pair.stable.data for pair in sets[form]]

    def ours() -> list[Tensor]:
        update_ema(laid, WEIGHT)
        return stables("loraforge")

    def by_names() -> list[Tensor]:
        for name, parameter in by_name.items():
            other = stable[name.replace("default", "ema")]
            other.data = (1.0 - WEIGHT) * other.data + WEIGHT * parameter.data
        return stables("reference")

    @torch.no_grad()
    def in_place() -> list[Tensor]:
        for pair in sets["torch"]:
            pair.stable.mul_(1.0 - WEIGHT).add_(pair.plastic, alpha=WEIGHT)
        return stables("torch")

    @torch.no_grad()
    def reset(form: str) -> None:
        for pair, value in zip(sets[form], start, strict=True):
            pair.stable.copy_(value)

    return Work(
        forms={"reference": by_names, "torch": in_place, "loraforge": ours},
        exact=lambda: [(1.0 - WEIGHT) * e.double() + WEIGHT * p.double() for e, p in zip(start, new, strict=True)],
        rtol=_FLOAT32,
        before=reset,
        peer="torch",
    )


def _pairs(start: list[Tensor], new: list[Tensor]) -> list[Pair]:
    """Parameters of their own with these values, named as PEFT names them."""
    return [
        Pair(f"model.layers.{i}.lora_A.default.weight", nn.Parameter(p.clone()), nn.Parameter(e.clone(), False))
        for i, (e, p) in enumerate(zip(start, new, strict=True))
    ]


def measure_buffer(session: Session, rows: int, tokens: int, drawn: int) -> None:
    """A draw, and the bytes of the rows held; `peak_bytes` of these rows."""
    offered = _texts(rows, tokens)
    buffer = ReplayBuffer(rows)
    buffer.offer(offered, 0)
    kept = [{name: tensor.clone() for name, tensor in row.items()} for row in offered]
    generator = random.Random(0)

    def plain() -> list[dict[str, Tensor]]:
        chosen = generator.sample(range(rows), drawn)
        return [{name: tensor.clone() for name, tensor in kept[at].items()} for at in chosen]

    forms: dict[str, Callable[[], Any]] = {"loraforge": lambda: buffer.draw(drawn), "torch": plain}
    times = interleave(forms, session.clock, runs=session.runs, budget=BUDGET[session.size])
    held = {
        "loraforge": buffer.nbytes,
        "torch": sum(t.numel() * t.element_size() for row in kept for t in row.values()),
    }
    case = f"draw {drawn} of {rows} x {tokens} tokens"
    size = {"rows": rows, "tokens": tokens, "drawn": drawn}
    error = round_trip_error(offered, buffer.draw(rows))
    for form, found in times.items():
        ours = form == "loraforge"
        session.add(
            "train", case, form, found, op="buffer", size=size, peak_bytes=held[form],
            error=error if ours else 0.0, allowed=0.0, ok=not ours or error == 0.0, peer="torch" if ours else None,
            speedup=times["torch"].median / max(found.median, 1e-9) if ours else None,
        )  # fmt: skip


def _texts(rows: int, tokens: int) -> list[dict[str, Tensor]]:
    """Rows of a language model, unpadded."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(_VOCABULARY, (rows, tokens), generator=generator)
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.masked_fill(row % 2 == 0, -100)}
        for row in ids
    ]


def round_trip_error(offered: list[dict[str, Tensor]], drawn: list[dict[str, Tensor]]) -> float:
    """0 if every row that was offered was drawn once and to the bit, else infinite."""
    if len(drawn) != len(offered):
        return float("inf")
    by_ids = {tuple(row["input_ids"].tolist()): row for row in drawn}
    worst = 0.0
    for row in offered:
        back = by_ids.get(tuple(row["input_ids"].tolist()))
        if back is None:
            return float("inf")
        worst = max(worst, error_of([back[name] for name in row], list(row.values())))
    return worst
