"""A LoRA adapter on disk, of any supported format, read module by module."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraforge.adapters.config import PeftSettings
from loraforge.adapters.formats.parts import Contents, ModuleInfo, Part
from loraforge.errors import LoraforgeError
from loraforge.storage.files import TensorFile, sha256_of
from loraforge.storage.names import natural_key
from loraforge.types import LowRank

__all__ = ["Adapter", "ModuleInfo", "is_finite"]

# File names that say nothing of the adapter; the folder's name does.
_USUAL_NAMES = {"adapter_model", "pytorch_lora_weights"}


class Adapter:
    """One trained LoRA on disk; nothing but the header is held.

    Attributes:
        path: Its folder or file.
        name: The folder's name, or the file's without its ending.
        format: "peft", "kohya", "diffusers" or "keymap".
        config: adapter_config.json as it is, {} where there is none.
        settings: The checked part of the configuration.
        metadata: The metadata of the file of tensors.
        notes: What was assumed or passed over while reading, in sentences for the report.
        modules: Module names, naturally sorted: dotted ones without "base_model.model.", kohya's as they are.
        heads: Keys of modules saved in full, without the prefix, naturally sorted.
        extras: Keys of biases, token rows and base weights, without the prefix, naturally sorted.
    """

    def __init__(
        self, path: Path, config: dict[str, Any], settings: PeftSettings, file: TensorFile, contents: Contents
    ) -> None:
        """Keeps what a format's reader found; `open_adapter` is the way to make one."""
        self.path, self.config, self.settings = path, config, settings
        whole = path.resolve()
        self.name = whole.name if whole.is_dir() else whole.parent.name if whole.stem in _USUAL_NAMES else whole.stem
        self.format, self.notes = contents.format, tuple(contents.notes)
        self.metadata: Mapping[str, str] = dict(file.metadata)
        self.heads = tuple(sorted(contents.heads, key=natural_key))
        self.extras = tuple(sorted(contents.extras, key=natural_key))
        self._stack: tuple[tuple[str, ...], list[Tensor]] = ((), [])
        self._file, self._whole = file, {**contents.extras, **contents.heads}
        self._set_parts(contents.parts)

    def __repr__(self) -> str:
        """Name and sizes."""
        return f"Adapter({self.name!r}, modules={len(self.modules)}, heads={len(self.heads)})"

    @property
    def base(self) -> str | None:
        """base_model_name_or_path, None where the file does not say."""
        return self.config.get("base_model_name_or_path") or None

    @property
    def task_type(self) -> str | None:
        """PEFT's task type, None where the file does not say."""
        return self.config.get("task_type") or None

    @property
    def has_dora(self) -> bool:
        """True where a module has a DoRA magnitude: its update is not B A alone."""
        return any(part.magnitude is not None for part in self._parts.values())

    @property
    def weights_path(self) -> Path:
        """The file of tensors."""
        return self._file.path

    @property
    def bytes(self) -> int:
        """Size of the file of tensors."""
        return self._file.path.stat().st_size

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file of tensors."""
        return sha256_of(self._file.path)

    def info(self, module: str) -> ModuleInfo:
        """Rank, scaling, shape and kind of a module, without loading it."""
        return self._parts[module].info

    def keys_of(self, module: str) -> tuple[str, ...]:
        """Keys in the file of a module's factors, bias and magnitude."""
        part = self._parts[module]
        return part.keys + tuple(key for key in (part.bias, part.magnitude) if key is not None)

    def load(self, module: str) -> LowRank:
        """The factors of a module as matrices, B (m, r), A (r, n), in the file's dtype.

        LoHa, LoKr and Tucker convolutions are products of stored tensors and come in float32 at least.

        Raises:
            LoraforgeError: A factor holds NaN or Inf, or the file cannot be read any more.
        """
        part = self._parts[module]
        stored = self._stored(part)
        B, A = part.build(stored)
        if not (is_finite(A) and is_finite(B)):
            self._refuse_infinite(part.keys, stored)
        return LowRank(B, A, part.info.scaling)

    def _stored(self, part: Part) -> list[Tensor]:
        """The tensors of a module; those of a stack of experts are kept until another stack is asked for."""
        if part.info.kind != "expert":
            return self._file.read(part.keys)
        if self._stack[0] != part.keys:
            self._stack = (part.keys, self._file.read(part.keys))
        return self._stack[1]

    def bias(self, module: str) -> Tensor | None:
        """The bias on lora_B (m,), not scaled, or None.

        Raises:
            LoraforgeError: It holds NaN or Inf, or the file cannot be read any more.
        """
        key = self._parts[module].bias
        return None if key is None else self._read(key).flatten()

    def magnitude(self, module: str) -> Tensor | None:
        """The DoRA magnitude (m,), or None.

        Raises:
            LoraforgeError: It holds NaN or Inf, or the file cannot be read any more.
        """
        key = self._parts[module].magnitude
        return None if key is None else self._read(key).flatten()

    def load_head(self, key: str) -> Tensor:
        """A tensor of `heads` or `extras`, as stored.

        Raises:
            LoraforgeError: It holds NaN or Inf, or the file cannot be read any more.
        """
        return self._read(self._whole[key])

    def renamed(self, names: Mapping[str, str]) -> Adapter:
        """The same adapter with modules under other names.

        Args:
            names: Old name -> new name; modules that it leaves out keep theirs.

        Raises:
            LoraforgeError: Two modules would get one name.
        """
        parts = {names.get(module, module): part for module, part in self._parts.items()}
        if len(parts) != len(self._parts):
            raise LoraforgeError("Two modules of an adapter would get one name", where=self.path)
        other = copy.copy(self)
        other._set_parts(parts)
        return other

    def _set_parts(self, parts: Mapping[str, Part]) -> None:
        self._parts = dict(parts)
        self.modules = tuple(sorted(parts, key=natural_key))
        self.modules_set = frozenset(self.modules)

    def _read(self, key: str) -> Tensor:
        (tensor,) = self._file.read((key,))
        if not is_finite(tensor):
            self._refuse_infinite((key,), (tensor,))
        return tensor

    def _refuse_infinite(self, keys: Sequence[str], tensors: Sequence[Tensor]) -> None:
        for key, tensor in zip(keys, tensors, strict=True):
            if not is_finite(tensor):
                bad = int((~torch.isfinite(tensor)).sum())
                raise LoraforgeError(
                    "A tensor holds NaN or Inf",
                    where=f"{self._file.path}: {key}",
                    got=f"{bad} of {tensor.numel()} entries",
                    expected="finite numbers",
                    hint="the training run broke down; take an earlier checkpoint of this adapter",
                )
        raise LoraforgeError("The product of stored factors overflows", where=f"{self._file.path}: {', '.join(keys)}")


def is_finite(tensor: Tensor) -> bool:
    """True where every entry is finite; one pass over the tensor in the usual case."""
    # A sum of finite numbers may overflow, a sum with NaN or Inf is never finite: only then every entry is looked at.
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())
