"""Figures of a training between two logs, summed on the device so that no micro-step waits for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loraforge.training import ranks

_MEANS = ("ce_current", "ce_replay", "l_cons", "kept_fraction")


class Figures:
    """Sums and counts of what is logged as a mean, over all processes; and what was replayed.

    Args:
        device: Of the losses.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, len(_MEANS), dtype=torch.float64, device=device)
        self._replayed: Counter[int] = Counter()

    @torch.no_grad()
    def add(self, name: str, total: Tensor, count: Tensor | int) -> None:
        """Adds to a mean's sum and count."""
        at = _MEANS.index(name)
        self._sums[0, at] += total.detach()
        self._sums[1, at] += count

    def replayed(self, tasks: Sequence[int]) -> None:
        """Notes rows that are replayed."""
        self._replayed.update(tasks)

    def taken(self, fill: int) -> dict[str, Any]:
        """The figures since the last call, of all processes, which all call it.

        Args:
            fill: Rows in this process's buffer.

        Returns:
            `ce_current`; `l_cons`, 0 where nothing was replayed; `ce_replay` and `kept_fraction` if something was;
            `buffer_fill`, and `replay_task_hist`: rows replayed of each task, by its number as text.
        """
        parts = ranks.gather((self._sums.tolist(), fill, dict(self._replayed)))
        self._sums.zero_()
        self._replayed.clear()
        logs: dict[str, Any] = {}
        for at, name in enumerate(_MEANS):
            total, count = (sum(sums[row][at] for sums, _, _ in parts) for row in (0, 1))
            if count:
                logs[name] = total / count
        logs.setdefault("l_cons", 0.0)
        replayed: Counter[int] = Counter()
        for _, _, part in parts:
            replayed.update(part)
        logs["buffer_fill"] = sum(held for _, held, _ in parts)
        logs["replay_task_hist"] = {str(task): count for task, count in sorted(replayed.items())}
        return logs
