"""Files of replay buffers: one .safetensors with the shards of all processes, rows of a key end to end with offsets.

They hold training rows as they are, so they are made readable by their owner alone, and appear whole or not at all.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from loraforge.errors import LoraforgeError
from loraforge.storage.atomic import write_whole

_HEADER = "replay_buffer"
_NUMBERS = ("capacity", "seed", "policy", "dedup", "rank", "world", "seen")
_VERSION = 1


def write_states(path: Path, states: Sequence[dict[str, Any]]) -> None:
    """Writes the states of all shards, in the order of their ranks.

    Args:
        path: The file; an older one stays until this one is whole.
        states: `ReplayBuffer.state_dict` of every process.
    """
    tensors: dict[str, Tensor] = {}
    heads = []
    # What every shard knows alike is written once.
    known = set.intersection(*(state["known"] for state in states))
    tensors["known"] = _codes(known)
    for at, state in enumerate(states):
        heads.append({name: state[name] for name in _NUMBERS} | {"seen_by_task": sorted(state["seen_by_task"].items())})
        tensors[f"{at}/tasks"] = torch.tensor(state["tasks"], dtype=torch.int64)
        tensors[f"{at}/known"] = _codes(state["known"] - known)
        tensors[f"{at}/fresh"] = _codes(state["fresh"])
        tensors[f"{at}/generator"] = torch.tensor(state["generator"], dtype=torch.int64)
        tensors |= {f"{at}/{name}": tensor for name, tensor in _pack(state["rows"]).items()}
    header = json.dumps({"version": _VERSION, "shards": heads}, sort_keys=True)
    write_whole(path, save(tensors, metadata={_HEADER: header}), private=True)


def read_states(path: Path) -> list[dict[str, Any]]:
    """The states of all shards.

    Raises:
        LoraforgeError: The file is missing, damaged, or no buffer's.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        reason = str(error).strip() or type(error).__name__
        raise LoraforgeError("the replay buffer cannot be read", where=path, got=reason) from error
    if not isinstance(header, dict) or header.get("version") != _VERSION:
        got = "none" if header is None else str(header)[:60]
        raise LoraforgeError("this is no replay buffer", where=path, got=got, expected=f"a header '{_HEADER}'")
    known = set(tensors["known"].tolist())
    states = []
    for at, head in enumerate(header["shards"]):
        own = {name.partition("/")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{at}/")}
        tasks = own["tasks"].tolist()
        states.append(
            head
            | {
                "seen_by_task": {int(task): int(count) for task, count in head["seen_by_task"]},
                "rows": _unpack(own, len(tasks)),
                "tasks": tasks,
                "known": known | set(own["known"].tolist()),
                "fresh": set(own["fresh"].tolist()),
                "generator": own["generator"].tolist(),
            }
        )
    return states


def _codes(codes: set[int]) -> Tensor:
    return torch.tensor(sorted(codes), dtype=torch.int64)


def _pack(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of one key, dtype and number of axes end to end, with the rows they belong to and their shapes."""
    groups: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
    for at, row in enumerate(rows):
        for key, value in row.items():
            groups[f"{key}/{str(value.dtype).removeprefix('torch.')}/{value.dim()}"].append((at, value))
    packed = {}
    for name, group in groups.items():
        packed[f"row/{name}/data"] = torch.cat([value.reshape(-1) for _, value in group])
        packed[f"row/{name}/rows"] = torch.tensor([at for at, _ in group], dtype=torch.int32)
        packed[f"row/{name}/shapes"] = torch.tensor([list(value.shape) for _, value in group], dtype=torch.int32)
    return packed


def _unpack(tensors: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    rows: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name in sorted(tensors):
        if not name.startswith("row/") or not name.endswith("/data"):
            continue
        stem = name.removesuffix("/data")
        key = stem.split("/")[1]
        shapes = tensors[f"{stem}/shapes"].tolist()
        sizes = [int(torch.Size(shape).numel()) for shape in shapes]
        for at, shape, piece in zip(tensors[f"{stem}/rows"].tolist(), shapes, tensors[name].split(sizes), strict=True):
            rows[at][key] = piece.reshape(shape).clone()
    return rows
