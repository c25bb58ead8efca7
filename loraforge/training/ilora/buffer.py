"""The replay buffer: a uniform sample of all training rows offered so far, in as few bytes as they need.

Algorithm R: the n-th row offered (from 0) fills slot n while n < K; then j is drawn from 0..n, and the row replaces
slot j if j < K. Every row is held with probability K / (n + 1), whenever it came. Under several processes each holds a
shard of the capacity and offers its own rows; `shards` joins them and deals them out.

The rows are training data as they are: files of a buffer are readable by their owner alone.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError
from loraforge.training.ilora.packing import read_states, write_states
from loraforge.training.ilora.shards import deal_out, merge_reservoirs

__all__ = ["POLICIES", "ReplayBuffer", "merge_reservoirs", "row_hash"]

POLICIES = ("reservoir", "task_balanced")
Row = dict[str, Tensor]
# Rebuilt when a row is drawn: its padding was cut off, so all of it is attended to.
MASK = "attention_mask"


class ReplayBuffer:
    """Rows of earlier tasks.

    Args:
        capacity: Rows held at most; 0 holds none.
        seed: Of the buffer's own draws; nothing else is ever drawn from.
        policy: One of POLICIES. `task_balanced`: a reservoir a task, of K / tasks rows each.
        dedup: Rows equal to one offered before are passed over.
        rank: Number of this shard.
        world: Number of shards.

    Attributes:
        seen: Rows offered so far, those passed over not counted.
    """

    def __init__(
        self,
        capacity: int,
        *,
        seed: int = 0,
        policy: str = "reservoir",
        dedup: bool = True,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if capacity < 0 or policy not in POLICIES:
            got, expected = f"capacity {capacity}, policy {policy!r}", f"0 or more rows; {' or '.join(POLICIES)}"
            raise LoraforgeError("a buffer that cannot be", where="buffer", got=got, expected=expected)
        self.capacity, self.seed, self.policy, self.dedup, self.rank, self.world = (
            capacity, seed, policy, dedup, rank, world,
        )  # fmt: skip
        self.seen = 0
        self.seen_by_task: Counter[int] = Counter()
        self.rows: list[Row] = []
        self.tasks: list[int] = []
        self.known: set[int] = set()  # hashes of all rows offered by all processes, as of the last exchange
        self.fresh: set[int] = set()  # those offered here since
        self.generator = random.Random(f"replay:{seed}:{rank}:{world}")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows held."""
        return sum(tensor.numel() * tensor.element_size() for row in self.rows for tensor in row.values())

    def histogram(self) -> dict[int, int]:
        """Rows held of each task."""
        return dict(sorted(Counter(self.tasks).items()))

    def offer(self, examples: Sequence[Row], task: int | Sequence[int]) -> None:
        """Takes up rows or passes them over.

        Args:
            examples: Unpadded rows, as TaskData has them; `attention_mask` (all ones) and `task` are not kept.
            task: Number of their task, or one number a row.
        """
        if self.capacity == 0:
            return
        numbers = [task] * len(examples) if isinstance(task, int) else list(task)
        for example, number in zip(examples, numbers, strict=True):
            row = _compact(example)
            if self.dedup:
                code = row_hash(row, number)
                if code in self.known or code in self.fresh:
                    continue
                self.fresh.add(code)
            slot = self._slot(number)
            self.seen += 1
            self.seen_by_task[number] += 1
            if slot == len(self.rows):
                self.rows.append(row)
                self.tasks.append(number)
            elif slot is not None:
                self.rows[slot], self.tasks[slot] = row, number

    def draw(self, size: int, exclude_task: int | None = None) -> list[Row]:
        """Up to `size` different rows, uniformly; none of task `exclude_task`. Each has `task` and, if text, a mask."""
        places = [at for at, task in enumerate(self.tasks) if task != exclude_task]
        chosen = self.generator.sample(places, min(size, len(places)))
        return [_expand(self.rows[at], self.tasks[at]) for at in chosen]

    def _slot(self, task: int) -> int | None:
        """Where a new row goes: a slot held, the number of rows held for a new one, or None."""
        if self.policy == "reservoir":
            if len(self.rows) < self.capacity:
                return len(self.rows)
            drawn = self.generator.randrange(self.seen + 1)
            return drawn if drawn < self.capacity else None
        if task not in self.seen_by_task:
            self._shrink([*self.seen_by_task, task])
        own = [at for at, number in enumerate(self.tasks) if number == task]
        share = _share(self.capacity, list(self.seen_by_task | {task: 0}), task)
        if len(own) < share:
            return len(self.rows)
        drawn = self.generator.randrange(self.seen_by_task[task] + 1)
        return own[drawn] if drawn < share else None

    def _shrink(self, tasks: list[int]) -> None:
        """Makes room for the last of the tasks: the others lose rows, uniformly, down to their new shares."""
        for task in tasks[:-1]:
            own = [at for at, number in enumerate(self.tasks) if number == task]
            excess = max(0, len(own) - _share(self.capacity, tasks, task))
            self.keep_all_but(self.generator.sample(own, excess))

    def keep_all_but(self, places: Sequence[int]) -> None:
        """Drops the rows at these places."""
        gone = set(places)
        kept = [at for at in range(len(self.rows)) if at not in gone]
        self.rows, self.tasks = [self.rows[at] for at in kept], [self.tasks[at] for at in kept]

    def exchange(self, codes: set[int]) -> None:
        """Takes note of the rows that all processes have offered since the last exchange."""
        self.known |= codes | self.fresh
        self.fresh = set()

    def state_dict(self) -> dict[str, Any]:
        """All there is, the generator's state included."""
        return {
            "capacity": self.capacity,
            "seed": self.seed,
            "policy": self.policy,
            "dedup": self.dedup,
            "rank": self.rank,
            "world": self.world,
            "seen": self.seen,
            "seen_by_task": dict(self.seen_by_task),
            "rows": list(self.rows),
            "tasks": list(self.tasks),
            "known": set(self.known),
            "fresh": set(self.fresh),
            "generator": list(self.generator.getstate()[1]),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Becomes what `state_dict` was taken of."""
        for name in ("capacity", "seed", "policy", "dedup", "rank", "world", "seen"):
            setattr(self, name, state[name])
        self.seen_by_task = Counter(state["seen_by_task"])
        self.rows, self.tasks = list(state["rows"]), list(state["tasks"])
        self.known, self.fresh = set(state["known"]), set(state["fresh"])
        self.generator.setstate((3, tuple(state["generator"]), None))

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> ReplayBuffer:
        """A buffer that is what `state_dict` was taken of."""
        buffer = cls(0)
        buffer.load_state_dict(state)
        return buffer

    def shard(self, rank: int, world: int) -> ReplayBuffer:
        """One process's part of this whole buffer; this buffer itself for one process.

        Raises:
            LoraforgeError: There are fewer places than processes.
        """
        return self if world == 1 else ReplayBuffer.from_state(deal_out(self.state_dict(), rank, world))

    def save(self, path: str | PathLike[str]) -> None:
        """Writes this buffer alone; `ILoraTrainer.save_buffer` writes those of all processes."""
        write_states(Path(path), [self.state_dict()])

    @classmethod
    def load(
        cls, path: str | PathLike[str], *, rank: int = 0, world: int = 1, capacity: int | None = None
    ) -> ReplayBuffer:
        """One process's buffer out of a file: as it was, or joined and dealt out if the number of processes changed.

        Args:
            path: The file.
            rank: Number of the process.
            world: Number of processes.
            capacity: Rows over all processes; None: as in the file. Rows that do not fit are drawn out uniformly.

        Raises:
            LoraforgeError: The file cannot be read, or there are fewer places than processes.
        """
        states = read_states(Path(path))
        total = sum(state["capacity"] for state in states)
        if len(states) == world and capacity in (None, total):
            return cls.from_state(states[rank])
        capacity = total if capacity is None else capacity
        key = f"merge:{states[0]['seed']}:{len(states)}:{capacity}:{sum(state['seen'] for state in states)}"
        whole = merge_reservoirs(states, capacity, random.Random(key))
        return cls.from_state(deal_out(whole, rank, world))


def _share(capacity: int, tasks: list[int], task: int) -> int:
    """Rows of one of several tasks; the earlier ones get what does not divide."""
    return capacity // len(tasks) + (tasks.index(task) < capacity % len(tasks))


def _compact(example: Row) -> Row:
    """A row in its own memory, whole numbers in 4 bytes where they fit."""
    row = {}
    for key, value in example.items():
        if key in (MASK, "task"):
            continue
        value = value.detach().to("cpu")
        fits = value.dtype == torch.int64 and (value.numel() == 0 or int(value.abs().max()) < 2**31)
        row[key] = value.to(torch.int32) if fits else value.clone()
    return row


def _expand(row: Row, task: int) -> Row:
    example = {key: value.long() if value.dtype == torch.int32 else value for key, value in row.items()}
    if "input_ids" in example:
        example[MASK] = torch.ones_like(example["input_ids"])
    return example | {"task": torch.tensor(task)}


def row_hash(row: Row, task: int) -> int:
    """64 bits of a row's content and task, the same in every process."""
    digest = hashlib.blake2b(str(task).encode(), digest_size=8)
    for key in sorted(row):
        value = row[key].contiguous()
        digest.update(f"{key}:{value.dtype}:{tuple(value.shape)}:".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return int.from_bytes(digest.digest(), "little", signed=True)
