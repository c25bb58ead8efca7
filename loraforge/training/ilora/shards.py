"""Shards of a replay buffer: joined into one sample, and dealt out to another number of processes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from loraforge.errors import LoraforgeError

Place = tuple[int, int]  # shard, slot


def merge_reservoirs(states: Sequence[dict[str, Any]], capacity: int, generator: random.Random) -> dict[str, Any]:
    """The state of one buffer that holds a uniform sample of everything the shards were offered.

    All rows are kept where they fit. Otherwise the next row comes from shard i with a probability in proportion to the
    offered rows of i that were not yet drawn from, and within a shard it is any of those held: a uniform draw from the
    union, as each shard is one from its own. A shard that has no more rows is passed over.

    Args:
        states: `ReplayBuffer.state_dict` of every shard.
        capacity: Rows held at most.
        generator: Of the draws. It is not used where all rows are kept.

    Returns:
        A state of world 1 without a generator's state of its own: `ReplayBuffer.shard` gives it one.
    """
    seen_by_task: Counter[int] = Counter()
    for state in states:
        seen_by_task.update({int(task): int(count) for task, count in state["seen_by_task"].items()})
    if sum(len(state["rows"]) for state in states) <= capacity:
        places = [(at, slot) for at, state in enumerate(states) for slot in range(len(state["rows"]))]
    elif states[0]["policy"] == "task_balanced":
        tasks, places = list(seen_by_task), []
        for nth, task in enumerate(tasks):
            share = capacity // len(tasks) + (nth < capacity % len(tasks))
            offered = [state["seen_by_task"].get(task, 0) for state in states]
            places += _draw(_held(states, task), offered, share, generator)
    else:
        places = _draw(_held(states, None), [state["seen"] for state in states], capacity, generator)
    codes: set[int] = set()
    return {
        **states[0],
        "capacity": capacity,
        "rank": 0,
        "world": 1,
        "seen": sum(state["seen"] for state in states),
        "seen_by_task": dict(seen_by_task),
        "rows": [states[at]["rows"][slot] for at, slot in places],
        "tasks": [states[at]["tasks"][slot] for at, slot in places],
        "known": codes.union(*(state["known"] | state["fresh"] for state in states)),
        "fresh": set(),
    }


def deal_out(state: dict[str, Any], rank: int, world: int) -> dict[str, Any]:
    """One process's shard of a whole buffer: rows of every task in equal numbers, as nearly as they divide.

    Raises:
        LoraforgeError: There are fewer places than processes, so that some could never replay.
    """
    capacity = state["capacity"]
    if 0 < capacity < world:
        raise LoraforgeError(
            "the replay buffer is smaller than the number of processes",
            where="ilora_buffer_size",
            got=capacity,
            expected=f"0, or at least {world}",
        )
    by_task = sorted(range(len(state["rows"])), key=lambda slot: state["tasks"][slot])  # stable: old order in a task
    mine = by_task[rank::world]
    seen_by_task = {task: _part(count, rank, world) for task, count in state["seen_by_task"].items()}
    generator = random.Random(f"replay:{state['seed']}:{rank}:{world}:{state['seen']}")
    return {
        **state,
        "capacity": _part(capacity, rank, world),
        "rank": rank,
        "world": world,
        "seen": max(_part(state["seen"], rank, world), len(mine)),
        "seen_by_task": seen_by_task,
        "rows": [state["rows"][slot] for slot in mine],
        "tasks": [state["tasks"][slot] for slot in mine],
        "known": state["known"] | state["fresh"],
        "fresh": set(),
        "generator": list(generator.getstate()[1]),
    }


def _part(count: int, rank: int, world: int) -> int:
    return count // world + (rank < count % world)


def _held(states: Sequence[dict[str, Any]], task: int | None) -> list[list[Place]]:
    return [
        [(at, slot) for slot, number in enumerate(state["tasks"]) if task is None or number == task]
        for at, state in enumerate(states)
    ]


def _draw(pools: list[list[Place]], offered: list[int], size: int, generator: random.Random) -> list[Place]:
    for pool in pools:
        generator.shuffle(pool)
    left = list(offered)
    chosen: list[Place] = []
    while len(chosen) < size and any(pools):
        weights = [max(count, 1) if pool else 0 for count, pool in zip(left, pools, strict=True)]
        (at,) = generator.choices(range(len(pools)), weights)
        chosen.append(pools[at].pop())
        left[at] -= 1
    return chosen
