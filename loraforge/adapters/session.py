"""Modules of one adapter on their way to disk: cast, laid out, written as they come, noted so that a run can go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraforge.adapters.keys import is_safe_name
from loraforge.adapters.layouts import Layout, Shape, Stored, alpha_of, stacked
from loraforge.adapters.origin import PeftMeta
from loraforge.adapters.reader import is_finite
from loraforge.adapters.renaming import renamed
from loraforge.errors import LoraforgeError
from loraforge.storage.stream import TensorStream, header_space
from loraforge.types import LowRank

# Room for the digits of metadata that are known at the end only.
_SPARE = 64


@dataclass(slots=True)
class WriteReport:
    """What was written.

    Attributes:
        path: The folder.
        dtype: Dtype of the factors.
        ranks: module -> rank.
        parameters: Entries of all factors.
        bytes: Size of the file of tensors.
        rounding: Largest relative Frobenius rounding error of a factor by the cast to dtype.
        rounding_module: Where that was.
        rows: module -> what the caller noted of it.
        file_ranks: Name in the file -> rank there (a stack of experts has one name and its largest rank).
        file_alphas: Name in the file -> alpha there.
    """

    path: Path
    dtype: str
    ranks: dict[str, int] = field(default_factory=dict)
    parameters: int = 0
    bytes: int = 0
    rounding: float = 0.0
    rounding_module: str | None = None
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    file_ranks: dict[str, int] = field(default_factory=dict)
    file_alphas: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Where each module goes.

    Attributes:
        layout: Keys of the format.
        dtype: Of the factors; None keeps each factor's own.
        keep_scales: Write the scale as alpha where the format has one, and leave the factors' bits alone.
        shapes: Module -> shape and kind.
        units: Module -> what it is written with: its own name in the file, or the name of its stack.
        parameters: Adapted parameters (stacks of experts).
    """

    layout: Layout
    dtype: torch.dtype | None
    keep_scales: bool
    shapes: Mapping[str, Shape]
    units: Mapping[str, str]
    parameters: tuple[str, ...]

    @classmethod
    def of(
        cls,
        modules: Sequence[str],
        heads: Sequence[str],
        meta: PeftMeta,
        layout: Layout,
        dtype: torch.dtype | None,
        keep_scales: bool,
    ) -> Places:
        """Decides for all modules.

        Raises:
            LoraforgeError: A name that is taken twice or not safe, or a name, kind of module or head that the format
                cannot express.
        """
        seen: set[str] = set()
        for name in modules:
            if not is_safe_name(name) or name in seen:
                raise LoraforgeError("A module name cannot be written", got=repr(name), expected="a new dotted name")
            seen.add(name)
        found = {name: meta.shapes.get(name, Shape()) for name in modules}
        if any(shape.biased for shape in found.values()):
            able = {name for name, shape in found.items() if shape.kind in ("linear", "conv")}
            found = {name: replace(shape, biased=name in able) for name, shape in found.items()}
        layout.check(found, heads)
        units = renamed([name for name in modules if found[name].parameter is None], layout.format, meta.parted)
        stacks = meta.stacks({shape.parameter for shape in found.values() if shape.parameter is not None})
        units |= {name: stacks[shape.parameter] for name, shape in found.items() if shape.parameter is not None}
        return cls(layout, dtype, keep_scales, found, {name: units[name] for name in modules}, tuple(stacks))

    def reserve(self, metadata: Mapping[str, str], whole: Mapping[str, Tensor]) -> int:
        """Bytes that the header takes at most, `whole` being tensors that are written beside the factors."""
        keys = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in whole.items()}
        for module, unit in self.units.items():
            keys |= self.layout.keys(unit, self.shapes[module], self.dtype)
        return header_space(keys, metadata) + _SPARE


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    """A module that is ready to be written: its factors, the rounding of each by the cast, the caller's notes."""

    stored: Stored
    rounding: dict[str, float]
    row: dict[str, Any] = field(default_factory=dict)


class WriteSession:
    """Takes modules one by one; each is on its way to disk when `add` returns, a stack of experts with its last one.

    Attributes:
        finished: Module -> row of what an interrupted run has written already.
        report: What is written.
    """

    def __init__(self, stream: TensorStream, places: Places, report: WriteReport) -> None:
        """Takes up what the stream's journal holds; `AdapterWriter.session` is the way to make one."""
        self.report = report
        self._stream, self._places = stream, places
        self._waiting: dict[str, dict[str, _Waiting]] = {}
        self._members: dict[str, list[str]] = {}
        for module, unit in places.units.items():
            self._members.setdefault(unit, []).append(module)
        for record in stream.records:
            self._account(record)
        self.finished: dict[str, dict[str, Any]] = dict(report.rows)

    def add(self, name: str, update: LowRank, row: Mapping[str, Any] | None = None, bias: Tensor | None = None) -> None:
        """Writes one module.

        Args:
            name: One of the announced modules, not added before.
            update: Its factors. The scaling is folded into B (or written as alpha, if scales are kept).
            row: JSON-ready notes, given back in `finished` and `report.rows`.
            bias: (m,) what lora_B adds to the output, scale included (excluded if scales are kept).

        Raises:
            LoraforgeError: Rank 0, or a factor that the dtype cannot hold.
            OSError: The disk refuses.
            ValueError: The module was not announced, is there already, or has a bias that was not announced.
        """
        unit = self._places.units.get(name)
        if unit is None or name in self.report.ranks or name in self._waiting.get(unit, {}):
            raise ValueError(f"module {name!r} was not announced or is written already")
        if bias is not None and not self._places.shapes[name].biased:
            raise ValueError(f"module {name!r} has a bias that was not announced")
        if update.rank == 0:
            raise LoraforgeError("A module of rank 0 cannot be written", where=name, expected="rank 1 or more")
        waiting = self._waiting.setdefault(unit, {})
        waiting[name] = replace(self._stored(name, update, bias), row=dict(row or {}))
        if len(waiting) == len(self._members[unit]):
            self._write(unit, self._waiting.pop(unit))

    def missing(self) -> list[str]:
        """Announced modules that have not been written."""
        return [name for name in self._places.units if name not in self.report.ranks]

    def _stored(self, name: str, update: LowRank, bias: Tensor | None) -> _Waiting:
        """The factors cast to their dtype, with the rounding that this cost."""
        places = self._places
        # Not 0: kohya's readers take an alpha of 0 for none at all.
        scale = update.scaling if places.keep_scales and places.layout.scales and update.scaling else 1.0
        exact = LowRank(update.B, update.A) if scale != 1.0 else update
        kinds = (places.dtype or update.B.dtype, places.dtype or update.A.dtype)
        if exact.scaling != 1.0:
            # Scaling is folded in at least float32, so that the cast below is the only rounding.
            wide = torch.promote_types(torch.promote_types(update.B.dtype, update.A.dtype), torch.float32)
            exact = exact.to(wide).folded()
        B, A = exact.B.detach().to("cpu", kinds[0]), exact.A.detach().to("cpu", kinds[1])
        if bias is not None:
            bias = bias.detach().to("cpu", kinds[0])
        for part, factor, given in (("A", A, exact.A), ("B", B, exact.B), ("B.bias", bias, bias)):
            if factor is not None and given is not None and not is_finite(factor):
                raise LoraforgeError(
                    "A factor is not finite in the dtype of the output",
                    where=f"{name}.lora_{part}",
                    got=f"largest entry {float(given.abs().max()):g} as {str(factor.dtype).removeprefix('torch.')}",
                    expected="finite numbers",
                    hint="write bfloat16 or float32",
                )
        rounding = {"A": rounding_error(exact.A, A), "B": rounding_error(exact.B, B)}
        return _Waiting(Stored(B, A, scale, bias), rounding)

    def _write(self, unit: str, waiting: Mapping[str, _Waiting]) -> None:
        """Writes the modules of a unit and marks the file."""
        one = next(iter(waiting))
        shape = self._places.shapes[one]
        whole = waiting[one].stored
        if shape.parameter is not None:
            numbers = {self._places.shapes[name].index: entry.stored for name, entry in waiting.items()}
            whole = stacked(numbers, shape.experts)
        rank = whole.rank // shape.experts if shape.parameter is not None else whole.rank
        for key, tensor in self._places.layout.tensors(unit, shape, whole).items():
            self._stream.append(key, tensor)
        worst = max(
            (
                (error, f"{name}.lora_{side}")
                for name, entry in waiting.items()
                for side, error in entry.rounding.items()
            ),
            key=lambda found: found[0],
        )
        record = {
            "file": shape.parameter or unit,
            "rank": rank,
            "alpha": alpha_of(whole.scale, rank),
            "parameters": whole.A.numel() + whole.B.numel(),
            "rounding": worst,
            "modules": {name: [entry.stored.rank, entry.row] for name, entry in waiting.items()},
        }
        self._stream.mark(record)
        self._account(record)

    def _account(self, record: Mapping[str, Any]) -> None:
        """Enters a written unit into the report; the same for one that an interrupted run wrote."""
        report = self.report
        report.file_ranks[record["file"]] = record["rank"]
        report.file_alphas[record["file"]] = record["alpha"]
        report.parameters += record["parameters"]
        if record["rounding"][0] > report.rounding:
            report.rounding, report.rounding_module = record["rounding"]
        for name, (rank, row) in record["modules"].items():
            report.ranks[name], report.rows[name] = rank, row


def rounding_error(exact: Tensor, stored: Tensor) -> float:
    """Relative Frobenius error of `stored` against `exact`; 0 where nothing was rounded."""
    if exact.dtype == stored.dtype:
        return 0.0
    wide = exact.detach().to("cpu", torch.promote_types(exact.dtype, torch.float32))
    size = _norm(wide)
    # Numbers that near each other are subtracted without rounding.
    return _norm(wide - stored) / size if size > 0.0 else 0.0


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
