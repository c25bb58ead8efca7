"""Fine-tuned models seen as adapters: the update of a tensor is its difference from the base, read when asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loraforge.checkpoints import Alignment, Checkpoint
from loraforge.errors import LoraforgeError
from loraforge.types import Dense

# Of fine-tuned matrices the task vector is a few per cent of the base; of two unrelated ones it is sqrt(2) of it.
UNRELATED = 1.0
_SAMPLED = 2**14  # entries of each matrix that this is judged by


@dataclass(frozen=True, slots=True)
class MatrixInfo:
    """What is known of a tensor without loading it, in the words of an adapter's module.

    Attributes:
        rank: min(m, n).
        scaling: 1.
        m: Rows.
        n: Columns.
        dtype: Dtype of the task vector: float64 where it is stored so, else float32.
    """

    rank: int
    scaling: float
    m: int
    n: int
    dtype: torch.dtype


class BaseWeights:
    """The base's tensors in the dtype of the arithmetic; the last one read is held, because every model asks for it."""

    def __init__(self, base: Checkpoint, device: torch.device | None = None) -> None:
        """Holds nothing yet.

        Args:
            base: The base.
            device: Where its tensors, and the task vectors against them, are computed; default the CPU.
        """
        self.checkpoint, self.device = base, device or torch.device("cpu")
        self._held: tuple[str, Tensor] | None = None

    def read(self, name: str) -> Tensor:
        """A tensor of the base, float64 where it is stored so, else float32. Not to be written into."""
        if self._held is None or self._held[0] != name:
            self._held = None  # let go of the last one before the next is read
            self._held = name, _wide(self.checkpoint.read_finite(name, self.device))
        return self._held[1]


class TaskVectors:
    """One fine-tuned model against the base; answers what a merge asks of an adapter.

    Attributes:
        name: The model's name.
        path: Its folder or file.
        modules: Names (the base's) of the tensors that are merged as matrices and that this model has.
        format: "model".
    """

    format = "model"
    has_dora = False
    task_type = None

    def __init__(self, base: BaseWeights, model: Checkpoint, alignment: Alignment, matrices: Sequence[str]) -> None:
        """Keeps the names.

        Args:
            base: The base.
            model: The fine-tuned model.
            alignment: Which of its tensors is which of the base.
            matrices: Names of the base's tensors that are merged as matrices.
        """
        self.checkpoint, self.alignment = model, alignment
        self.name, self.path = model.name, Path(model.path)
        self.base = str(base.checkpoint.path)
        self.modules = tuple(name for name in matrices if name in alignment.names)
        self.modules_set = frozenset(self.modules)
        self._base = base
        self._changed = self._own = torch.zeros((), dtype=torch.float64)  # on the device from the first tensor on

    @property
    def sha256(self) -> str:
        """SHA-256 of the model's weights."""
        return self.checkpoint.sha256

    def info(self, module: str) -> MatrixInfo:
        """Rank and shape of a tensor seen as a matrix."""
        m, n = matrix_shape(self._base.checkpoint.shape(module))
        wide = self._base.checkpoint.dtype(module) == torch.float64
        return MatrixInfo(min(m, n), 1.0, m, n, torch.float64 if wide else torch.float32)

    def load(self, module: str) -> Dense:
        """The task vector of a tensor as a matrix."""
        delta = self.delta(module)
        self._changed = _sampled_square(delta) + self._changed
        self._own = _sampled_square(self._base.read(module)) + self._own
        return Dense(delta.reshape(matrix_shape(tuple(delta.shape))))

    def bias(self, module: str) -> Tensor | None:
        """None: a bias is a tensor of its own."""
        return None

    def doubts(self) -> list[str]:
        """A sentence where the matrices read so far differ from the base's by more than those are large."""
        changed, own = float(self._changed), float(self._own)
        if changed <= UNRELATED**2 * own:
            return []
        size = (changed / own) ** 0.5 if own > 0.0 else math.inf
        return [f"{self.name}: ||W - W_0|| is {size:.3g} ||W_0||: was it fine-tuned from {self.base}?"]

    def delta(self, name: str) -> Tensor:
        """W_i - W_0 of a tensor, float64 where either is stored so, else float32.

        Raises:
            LoraforgeError: Either holds NaN or Inf.
        """
        # As it is stored: half precision is half the way to a GPU.
        tuned = self.checkpoint.read_finite(self.alignment.names[name], self._base.device)
        base = self._base.read(name)
        dtype = torch.promote_types(base.dtype, _wide_dtype(tuned.dtype))
        return tuned.to(dtype) - base.to(dtype)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """(m, n) of a tensor seen as a matrix: a convolution as (out, in * kernel), a vector as one row."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def check_integers(base: Checkpoint, models: Sequence[Checkpoint], alignments: Sequence[Alignment]) -> None:
    """Refuses integer tensors (positions, masks, packed weights) that differ from the base's.

    Raises:
        LoraforgeError: Naming the first such tensor.
    """
    for model, alignment in zip(models, alignments, strict=True):
        for name, own in alignment.names.items():
            if base.is_float(name) and model.is_float(own):
                continue
            if base.dtype(name) == model.dtype(own) and torch.equal(base.read(name), model.read(own)):
                continue
            raise LoraforgeError(
                "Integer tensors cannot be merged and differ from the base's",
                where=f"{model.path}: {own}",
                got=f"{model.dtype(own)}, in the base {base.dtype(name)}",
                expected="equal integer tensors; weights in float32, bfloat16, float16 or float64",
                hint="quantised weights must be turned back into floating point first",
            )


def _sampled_square(matrix: Tensor) -> Tensor:
    """Sum of squares over evenly spaced entries, 0-dim float64: read once, at the end."""
    flat = matrix.reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLED)].square().sum(dtype=torch.float64)


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_wide_dtype(tensor.dtype))
