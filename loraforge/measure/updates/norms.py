"""Norms of the base's slices, head by head: what an update is relative to. Streamed, float64, kept by the base's hash.

    n_c = ||W0_c,h||_F for c in q, k, v (rows of the head) and o (columns)

The cache file holds the norms of several bases, each under the SHA-256 of its weights and of the layout; a base is then
hashed, but its matrices are not read again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraforge.adapters.reader import is_finite
from loraforge.checkpoints import Checkpoint
from loraforge.errors import LoraforgeError
from loraforge.measure.files import write_json
from loraforge.measure.heads.layout import PARTS, Attention, HeadLayout, Projection
from loraforge.measure.updates.matching import layout_modules, match_projections
from loraforge.measure.updates.slices import head_sums, slice_norms

# Part -> norm of the slice of each of its heads (n_q or n_kv); of biases under "bq", "bk", "bv".
PartNorms = dict[str, Tensor]


class BaseWeights:
    """The weights of a model under the layout's names, in the (out, in) orientation, read one at a time.

    Args:
        checkpoint: The model.
        layout: Whose modules are asked for.

    Raises:
        LoraforgeError: A projection of the layout is not in the model, or is stored as packed integers.
    """

    def __init__(self, checkpoint: Checkpoint, layout: HeadLayout) -> None:
        self.checkpoint = checkpoint
        present = [name.removesuffix(".weight") for name in checkpoint.names if name.endswith(".weight")]
        self.names = match_projections(layout, present)
        missing = [module for module in layout_modules(layout) if module not in self.names]
        if missing:
            raise LoraforgeError(
                "projections of the layout are not in the base", where=checkpoint.path,
                got=f"none of {', '.join(missing[:4])}" + (f" and {len(missing) - 4} more" if len(missing) > 4 else ""),
                expected="the base that the layout belongs to", hint="check --base",
            )  # fmt: skip
        packed = [module for module, name in self.names.items() if not checkpoint.is_float(f"{name}.weight")]
        if packed:
            raise LoraforgeError(
                "the base's weights are quantised", where=f"{checkpoint.path}: {packed[0]}",
                got=str(checkpoint.dtype(f"{self.names[packed[0]]}.weight")), expected="floating point weights",
                hint="give the model before its quantisation; or no --base but --config: U needs no weights",
            )  # fmt: skip

    def read(self, projection: Projection) -> Tensor:
        """W0 of a projection as stored, turned to (out, in).

        Raises:
            LoraforgeError: It holds NaN or Inf.
        """
        tensor = read_checked(self.checkpoint, f"{self.names[projection.module]}.weight")
        return tensor.mT if projection.transposed else tensor

    def bias(self, projection: Projection) -> Tensor | None:
        """The bias of a projection (out,), None where it has none."""
        name = f"{self.names[projection.module]}.bias"
        return read_checked(self.checkpoint, name) if name in self.checkpoint else None

    def of(self, attention: Attention) -> dict[str, Tensor]:
        """Module -> W0 (out, in) of an attention; a module that q, k and v share is read once."""
        return {place.module: self.read(place) for place in one_a_module(attention)}


def read_checked(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor as stored; finite, by its sum in the usual case, which costs a tenth of looking at every entry.

    Raises:
        LoraforgeError: It holds NaN or Inf.
    """
    tensor = checkpoint.read(name)
    return tensor if is_finite(tensor) else checkpoint.read_finite(name)


def one_a_module(attention: Attention) -> list[Projection]:
    """A projection of each module of an attention."""
    found: dict[str, Projection] = {}
    for part in PARTS:
        place = attention.part(part)
        if place is not None:
            found.setdefault(place.module, place)
    return list(found.values())


def part_norms(attention: Attention, matrices: Mapping[str, Any]) -> PartNorms:
    """Norm of each head's slice of each part, of weights or updates by module; zeros where a module has none.

    Raises:
        LoraforgeError: A matrix does not fit the layout.
    """
    found: PartNorms = {}
    for part in PARTS:
        place = attention.part(part)
        if place is None:
            continue
        matrix = matrices.get(place.module)
        zeros = torch.zeros(place.heads, dtype=torch.float64)
        found[part] = zeros if matrix is None else slice_norms(matrix, place, part)
    return found


def bias_norms(attention: Attention, biases: Mapping[str, Tensor | None]) -> PartNorms:
    """Norm of each head's part of the biases of q, k and v by module; O's bias belongs to no head."""
    found: PartNorms = {}
    for part in PARTS[:3]:
        place = attention.part(part)
        if place is None:
            continue
        bias = biases.get(place.module)
        zeros = torch.zeros(place.heads, dtype=torch.float64)
        squares = None if bias is None else bias.to(torch.float64).square()
        found[f"b{part}"] = zeros if squares is None else head_sums(squares, place).sqrt()
    return found


def base_norms(
    base: Checkpoint, layout: HeadLayout, *, cache: Path | None = None, sha256: str | None = None
) -> list[PartNorms]:
    """Norms of the base's slices, one mapping an attention, in the layout's order.

    Args:
        base: The base.
        layout: Its layout.
        cache: File (base_norms.json) that keeps them; made or added to as needed.
        sha256: Hash of the base's weights where the caller knows it; only used with a cache.

    Raises:
        LoraforgeError: The base does not fit the layout, or the cache is no such file.
    """
    norms = NormsCache(cache, base, layout, sha256=sha256) if cache is not None else None
    if norms is not None and norms.found is not None:
        return norms.found
    weights = BaseWeights(base, layout)
    found = [part_norms(attention, weights.of(attention)) for attention in layout.attentions]
    if norms is not None:
        norms.keep(found)
    return found


class NormsCache:
    """A file of base norms by hash.

    Attributes:
        found: The norms that it held for this base and layout, or None.

    Raises:
        LoraforgeError: The file is there and is no cache.
    """

    def __init__(self, path: Path, base: Checkpoint, layout: HeadLayout, *, sha256: str | None = None) -> None:
        self.path, self.key = path, f"{sha256 or base.sha256}/{layout.sha256}"
        self._content: dict[str, Any] = {}
        if path.is_file():
            try:
                self._content = json.loads(path.read_text(encoding="utf-8"))
                entries = self._content["norms"].get(self.key)
                self.found = None if entries is None else [_tensors(entry) for entry in entries]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise LoraforgeError(
                    "the file is no cache of base norms", where=path, got=str(error)[:80], hint="remove it"
                ) from error
        else:
            self._content, self.found = {"norms": {}}, None

    def keep(self, norms: Iterable[PartNorms]) -> None:
        """Adds the norms of this base and writes the file."""
        entries = [{part: values.tolist() for part, values in entry.items()} for entry in norms]
        self._content["norms"][self.key] = entries
        write_json(self.path, self._content)


def _tensors(entry: Mapping[str, list[float]]) -> PartNorms:
    return {part: torch.tensor(values, dtype=torch.float64) for part, values in entry.items()}
