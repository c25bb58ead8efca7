"""A PEFT LoRA adapter on disk, read module by module."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraforge.adapters.config import CONFIG_NAME, PeftSettings, parse_config, read_config
from loraforge.adapters.folder import find_weights
from loraforge.adapters.keys import KeyTable, natural_key, shorten, sort_keys
from loraforge.errors import LoraforgeError, raise_problems
from loraforge.storage.files import TensorFile, open_tensors, sha256_of
from loraforge.types import LowRank


@dataclass(frozen=True, slots=True)
class ModuleInfo:
    """What the header and the configuration say of one module.

    Attributes:
        rank: r, from the shapes of the factors.
        scaling: alpha / r, or alpha / sqrt(r) for rsLoRA.
        m: Rows of B, the outputs.
        n: Columns of A, the inputs.
        dtype: Dtype of A as stored.
        fan_in_fan_out: The base layer is a Conv1D.
    """

    rank: int
    scaling: float
    m: int
    n: int
    dtype: torch.dtype
    fan_in_fan_out: bool


class Adapter:
    """One trained LoRA on disk; nothing but the header is held.

    Attributes:
        path: Its folder.
        name: The folder's name.
        config: adapter_config.json as it is.
        settings: The checked part of the configuration.
        modules: Dotted module names without "base_model.model.", naturally sorted.
        heads: Keys of modules saved in full, without the prefix, naturally sorted.
        extras: Keys of biases, token rows and base weights, without the prefix, naturally sorted.
    """

    def __init__(
        self, path: Path, config: dict[str, Any], settings: PeftSettings, file: TensorFile, table: KeyTable
    ) -> None:
        """Keeps the table of keys; `open_adapter` is the way to make one."""
        self.path, self.config, self.settings = path, config, settings
        self.name = path.resolve().name
        self._file, self._table = file, table
        self.modules = tuple(sorted(table.factors, key=natural_key))
        self.heads = tuple(sorted(table.heads, key=natural_key))
        self.extras = tuple(sorted(table.extras, key=natural_key))
        self.modules_set = frozenset(self.modules)
        self._infos = {module: self._read_info(module) for module in self.modules}

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
        """Rank, scaling and shape of a module, without loading it."""
        return self._infos[module]

    def load(self, module: str) -> LowRank:
        """The factors of a module in the file's dtype: B (m, r), A (r, n).

        Raises:
            LoraforgeError: A factor holds NaN or Inf, or the file cannot be read any more.
        """
        key_A, key_B = self._table.factors[module]
        A, B = self._read(key_A, key_B)
        return LowRank(B, A, self._infos[module].scaling)

    def load_head(self, key: str) -> Tensor:
        """A tensor of `heads` or `extras`, as stored.

        Raises:
            LoraforgeError: It holds NaN or Inf, or the file cannot be read any more.
        """
        return self._read(self._table.heads.get(key) or self._table.extras[key])[0]

    def _read(self, *keys: str) -> list[Tensor]:
        tensors = self._file.read(keys)
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
        return tensors

    def _read_info(self, module: str) -> ModuleInfo:
        key_A, key_B = self._table.factors[module]
        (rank, n), (m, _) = self._file.shapes[key_A], self._file.shapes[key_B]
        scaling = self.settings.scaling_of(module, rank)
        return ModuleInfo(rank, scaling, m, n, self._file.dtypes[key_A], self.settings.fan_in_fan_out)


def open_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Opens a PEFT LoRA folder; tensors are loaded later, module by module.

    Args:
        path: Folder with adapter_config.json and adapter_model.safetensors (or .bin).

    Raises:
        LoraforgeError: Something is missing, damaged, contradicting or unsupported; all problems are shown at once.
    """
    folder = Path(path)
    weights = find_weights(folder)
    config = read_config(folder)
    settings = parse_config(config, folder / CONFIG_NAME)
    file = open_tensors(weights)
    table, problems = sort_keys(file.shapes, settings, weights)
    for module in list(table.factors):
        problem = shape_problem(module, table, file, settings)
        if problem is not None:
            problems.append(problem)
    raise_problems(join_alike(problems))
    if not table.factors:
        raise LoraforgeError("The adapter holds no LoRA factors", where=weights, got=shorten(file.shapes) or "no keys")
    return Adapter(folder, config, settings, file, table)


def shape_problem(module: str, table: KeyTable, file: TensorFile, settings: PeftSettings) -> LoraforgeError | None:
    """What is wrong with the shapes of a module's factors, or None. Dropped from the table when wrong."""
    key_A, key_B = table.factors[module]
    A, B = file.shapes[key_A], file.shapes[key_B]
    where = f"{file.path}: {key_A}"
    wrong: LoraforgeError | None = None
    if len(A) > 2 or len(B) > 2:
        wrong = LoraforgeError(
            "LoRA on convolutions is not supported", where=where, got=f"A {list(A)}, B {list(B)}", expected="matrices"
        )
    elif len(A) != 2 or len(B) != 2 or A[0] != B[1] or 0 in A + B:
        wrong = LoraforgeError(
            "The factors of a module do not fit",
            where=where,
            got=f"A {list(A)}, B {list(B)}",
            expected="A [r, n] and B [m, r]",
        )
    elif A[0] != settings.rank_of(module):
        wrong = LoraforgeError(
            "The rank of the factors contradicts adapter_config.json",
            where=where,
            got=f"rank {A[0]}",
            expected=f"rank {settings.rank_of(module)} (r, rank_pattern)",
            hint="the weights and the configuration come from different runs; pair them again",
        )
    if wrong is not None:
        del table.factors[module]
    return wrong


def join_alike(problems: list[LoraforgeError], limit: int = 5) -> list[LoraforgeError]:
    """At most `limit` problems of one kind, the last of them saying how many more there are."""
    kept: list[LoraforgeError] = []
    counts: dict[str, int] = {}
    for problem in problems:
        kind = problem.what.partition("'")[0]
        counts[kind] = counts.get(kind, 0) + 1
        if counts[kind] <= limit:
            kept.append(problem)
    more = {kind: count - limit for kind, count in counts.items() if count > limit}
    return kept + [LoraforgeError(f"{count} more like: {kind.strip()}") for kind, count in more.items()]


def is_finite(tensor: Tensor) -> bool:
    """True where every entry is finite; one pass over the tensor in the usual case."""
    # A sum of finite numbers may overflow, a sum with NaN or Inf is never finite: only then every entry is looked at.
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())
