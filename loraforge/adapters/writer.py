"""Writes a PEFT LoRA folder whose per-module scale is exactly 1, whole or not at all."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from loraforge.adapters.config import CONFIG_NAME
from loraforge.adapters.folder import WEIGHT_NAMES
from loraforge.adapters.heads import HeadsPlan
from loraforge.adapters.keys import PREFIX, is_safe_name
from loraforge.adapters.reader import Adapter, is_finite
from loraforge.errors import LoraforgeError
from loraforge.storage.atomic import new_folder
from loraforge.types import LowRank


@dataclass(frozen=True, slots=True)
class PeftMeta:
    """Fields of the configuration that come from the adapters.

    Attributes:
        base: base_model_name_or_path.
        task_type: PEFT's task type.
        fan_in_fan_out: The base layers are Conv1D.
        inputs: Folders that were read, which the output must not replace.
    """

    base: str | None = None
    task_type: str | None = None
    fan_in_fan_out: bool = False
    inputs: tuple[Path, ...] = ()

    @classmethod
    def like(cls, adapters: Sequence[Adapter]) -> PeftMeta:
        """The fields of the first adapter that states each; Conv1D if any adapter says so."""
        return cls(
            base=next((a.base for a in adapters if a.base), None),
            task_type=next((a.task_type for a in adapters if a.task_type), None),
            fan_in_fan_out=any(a.settings.fan_in_fan_out for a in adapters),
            inputs=tuple(a.path for a in adapters),
        )


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
    """

    path: Path
    dtype: str
    ranks: dict[str, int] = field(default_factory=dict)
    parameters: int = 0
    bytes: int = 0
    rounding: float = 0.0
    rounding_module: str | None = None


ExtraFile = bytes | str | Callable[[WriteReport], bytes | str]


@dataclass(slots=True)
class AdapterWriter:
    """Writes one merged adapter.

    Attributes:
        out: The folder to make.
        like: The adapters it comes from, or the fields taken from them.
        dtype: Dtype of the written factors.
        heads: What becomes of heads; none by default.
        extra_files: Path inside the folder -> content, or a function of the WriteReport that gives the content.
        overwrite: Replace an earlier output.
    """

    out: str | os.PathLike[str]
    like: Sequence[Adapter] | PeftMeta
    dtype: torch.dtype = torch.float32
    heads: HeadsPlan = field(default_factory=HeadsPlan)
    extra_files: Mapping[str, ExtraFile] = field(default_factory=dict)
    overwrite: bool = False

    def write(self, modules: Iterable[tuple[str, LowRank]]) -> WriteReport:
        """Casts modules as they come and writes the folder.

        Args:
            modules: (dotted name without prefix, update). Scalings are folded into B.

        Returns:
            Ranks, sizes and the rounding error.

        Raises:
            LoraforgeError: The output exists, a factor does not fit the dtype, or the disk refuses. Nothing is left
                behind then, and an earlier output is untouched.
        """
        meta = self.like if isinstance(self.like, PeftMeta) else PeftMeta.like(self.like)
        out = Path(self.out).resolve()
        for source in meta.inputs:
            if out == source.resolve() or out in source.resolve().parents:
                raise LoraforgeError("The output would replace an input adapter", where=out, got=f"input {source}")
        report = WriteReport(out, str(self.dtype).removeprefix("torch."))
        with new_folder(out, self.overwrite) as folder:
            tensors: dict[str, Tensor] = {}
            for name, update in modules:
                self._add(tensors, name, update, report)
            if not report.ranks:
                raise LoraforgeError("There is no module to write", where=out, expected="at least one module")
            tensors.update((PREFIX + key, own_copy(tensor)) for key, tensor in self.heads.merged.items())
            save_tensors(folder / WEIGHT_NAMES[0], tensors)
            report.bytes = (folder / WEIGHT_NAMES[0]).stat().st_size
            config = peft_config(report.ranks, meta, self.heads)
            (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            self._write_aside(folder)
            for relative, content in self.extra_files.items():
                _write_extra(folder, relative, content(report) if callable(content) else content)
        return report

    def _add(self, tensors: dict[str, Tensor], name: str, update: LowRank, report: WriteReport) -> None:
        if not is_safe_name(name) or name in report.ranks:
            raise LoraforgeError("A module name cannot be written", got=repr(name), expected="a new dotted name")
        if update.rank == 0:
            raise LoraforgeError("A module of rank 0 cannot be written", where=name, expected="rank 1 or more")
        # Scaling is folded in at least float32, so that the cast below is the only rounding.
        wide = update.to(torch.promote_types(update.B.dtype, torch.float32)).folded()
        for side, factor in (("A", wide.A), ("B", wide.B)):
            stored = own_copy(factor, self.dtype)
            if not is_finite(stored):
                raise LoraforgeError(
                    "A factor is not finite in the dtype of the output",
                    where=f"{name}.lora_{side}",
                    got=f"largest entry {float(factor.abs().max()):g} as {report.dtype}",
                    expected="finite numbers",
                    hint="write bfloat16 or float32",
                )
            error = rounding_error(factor, stored)
            if error > report.rounding:
                report.rounding, report.rounding_module = error, f"{name}.lora_{side}"
            tensors[f"{PREFIX}{name}.lora_{side}.weight"] = stored
            report.parameters += stored.numel()
        report.ranks[name] = update.rank

    def _write_aside(self, folder: Path) -> None:
        for name, tensors in self.heads.aside.items():
            place = folder / "heads" / name
            place.mkdir(parents=True)
            save_tensors(place / "heads.safetensors", {key: own_copy(tensor) for key, tensor in tensors.items()})
            (place / "heads.json").write_text(self.heads.index_of(name), encoding="utf-8")


def write_adapter(
    out: str | os.PathLike[str],
    modules: Iterable[tuple[str, LowRank]],
    like: Sequence[Adapter] | PeftMeta,
    dtype: torch.dtype = torch.float32,
    heads: HeadsPlan | None = None,
    extra_files: Mapping[str, ExtraFile] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a merged adapter and returns its folder; `AdapterWriter` does the same and returns the report."""
    return AdapterWriter(out, like, dtype, heads or HeadsPlan(), extra_files or {}, overwrite).write(modules).path


def peft_config(ranks: Mapping[str, int], meta: PeftMeta, heads: HeadsPlan) -> dict[str, Any]:
    """The adapter_config.json of a merged adapter: alpha equals the rank of every module, so each scale is 1.

    Args:
        ranks: module -> rank.
        meta: Fields that come from the adapters.
        heads: Heads and extras that are merged in.
    """
    top = max(ranks.values())
    # "^" and escaping make each pattern match one full name and nothing else (PEFT tries it as a suffix otherwise).
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != top}
    return {
        "peft_type": "LORA",
        "task_type": meta.task_type,
        "base_model_name_or_path": meta.base,
        "r": top,
        "lora_alpha": top,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "use_rslora": False,
        "use_dora": False,
        "target_modules": sorted(ranks),
        "modules_to_save": list(heads.modules_to_save) or None,
        "fan_in_fan_out": meta.fan_in_fan_out,
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
        **heads.config,
    }


def own_copy(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous copy on the CPU that shares memory with nothing (safetensors refuses shared storage)."""
    return tensor.detach().to(device="cpu", dtype=dtype or tensor.dtype, copy=True).contiguous()


def rounding_error(exact: Tensor, stored: Tensor) -> float:
    """Relative Frobenius error of `stored` against `exact`; 0 where nothing was rounded."""
    if exact.dtype == stored.dtype:
        return 0.0
    wide = exact.detach().to(device="cpu", dtype=torch.float64)
    size = float(wide.norm())
    return float((stored.to(torch.float64) - wide).norm()) / size if size > 0.0 else 0.0


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a .safetensors file with the metadata that PEFT writes.

    Raises:
        OSError: The disk refuses.
    """
    # safetensors leaves a file that only its owner may read; the usual rights are those of a plain new file.
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(mode)


def _write_extra(folder: Path, relative: str, content: bytes | str) -> None:
    parts = PurePosixPath(relative)
    if parts.is_absolute() or ".." in parts.parts or not parts.name:
        raise LoraforgeError("An extra file lies outside the output folder", got=relative, expected="a relative path")
    path = folder / parts
    if path.exists():
        raise LoraforgeError("An extra file would replace a file of the adapter", got=relative)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
