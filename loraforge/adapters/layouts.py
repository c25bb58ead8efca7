"""How modules lie in the files of each format: keys, shapes and what surrounds them.

| | PEFT | kohya | diffusers |
|---|---|---|---|
| A (r, n) | X.lora_A.weight | X.lora_down.weight | X.lora.down.weight |
| B (m, r) | X.lora_B.weight | X.lora_up.weight | X.lora.up.weight |
| scale | alpha in the configuration | X.alpha | always 1 |

A convolution's factors are stored as convolutions, A (r, in, kernel) and B (m, r, 1, ...). PEFT alone holds embeddings
(lora_embedding_A, lora_embedding_B), biases of lora_B and stacks of experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraforge.adapters.keys import PREFIX, shorten
from loraforge.errors import LoraforgeError, UsageError

FORMATS = ("peft", "kohya", "diffusers")
# Beyond any factor: sizes of modules whose shape is not known before they come.
_ANY = 9_999_999
_KEPT_METADATA = ("ss_base_model_version", "ss_v2", "ss_v_parameterization", "ss_sd_model_name")


@dataclass(frozen=True, slots=True)
class Shape:
    """What the file needs to know of one module beside its factors.

    Attributes:
        kind: "linear", "conv", "embedding" or "expert".
        m: Rows of B.
        n: Columns of A.
        kernel: Kernel of a convolution.
        parameter: Experts: full name of the stacked parameter.
        index: Experts: number in the stack.
        experts: Experts: how many the stack has.
        rank: The largest rank it can get.
        biased: lora_B has a bias.
    """

    kind: str = "linear"
    m: int = _ANY
    n: int = _ANY
    kernel: tuple[int, ...] = ()
    parameter: str | None = None
    index: int = 0
    experts: int = 1
    rank: int = _ANY
    biased: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """One module as it goes into the file: factors cast to their dtype, the scale of their product, its bias."""

    B: Tensor
    A: Tensor
    scale: float = 1.0
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        """r of the factors."""
        return int(self.A.shape[0])


@dataclass(frozen=True, slots=True)
class Layout:
    """Keys of a format.

    Attributes:
        format: Its name.
        prefix: In front of every key.
        down: Suffix of A.
        up: Suffix of B.
        has_alpha: The file holds each module's alpha.
    """

    format: str
    prefix: str
    down: str
    up: str
    has_alpha: bool = False

    @property
    def scales(self) -> bool:
        """Whether the format can state a scale other than 1."""
        return self.format != "diffusers"

    def file_name(self, folder: str) -> str:
        """The file of tensors in a folder of this name."""
        return {
            "peft": "adapter_model.safetensors",
            "kohya": f"{folder.removesuffix('.safetensors')}.safetensors",
            "diffusers": "pytorch_lora_weights.safetensors",
        }[self.format]

    def check(self, shapes: Mapping[str, Shape], heads: Sequence[str]) -> None:
        """Refuses what the format cannot hold.

        Raises:
            LoraforgeError: Names the modules or heads.
        """
        if self.format == "peft":
            self._check_biases(shapes)
            return
        lost = {
            "an embedding": [name for name, shape in shapes.items() if shape.kind == "embedding"],
            "experts of an adapted parameter": [name for name, shape in shapes.items() if shape.kind == "expert"],
            "a bias on lora_B": [name for name, shape in shapes.items() if shape.biased],
            "whole weights (heads, biases, token rows)": heads,
        }
        for what, names in lost.items():
            if names:
                raise LoraforgeError(
                    f"The format {self.format} cannot hold {what}",
                    where=names[0],
                    got=shorten(names),
                    expected="LoRA factors of linear and convolution modules",
                    hint="write it as PEFT (--to peft, --format peft)",
                )

    def _check_biases(self, shapes: Mapping[str, Shape]) -> None:
        """PEFT gives every module a bias on lora_B or none, and embeddings and experts cannot have one."""
        biased = [name for name, shape in shapes.items() if shape.biased]
        unable = [name for name, shape in shapes.items() if shape.kind in ("embedding", "expert")]
        if biased and unable:
            raise LoraforgeError(
                "PEFT cannot load a bias on lora_B (lora_bias) beside LoRA on embeddings or experts",
                where=unable[0],
                got=f"{shorten(biased, 2)} with a bias, {shorten(unable, 2)} without",
                expected="adapters with one or the other",
            )

    def keys(
        self, name: str, shape: Shape, dtype: torch.dtype | None
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Keys of a module (or, for an expert, of its stack, under the stack's name) with the largest shapes.

        Args:
            name: As the file writes it.
            shape: What is known of it.
            dtype: Of the factors; None where each keeps its own.
        """
        kind = dtype or torch.float64
        rank = shape.rank * (shape.experts if shape.kind == "expert" else 1)
        ones = (1,) * len(shape.kernel)
        down, up = self._suffixes(shape)
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            f"{self.prefix}{name}{down}": (kind, (rank, shape.n, *shape.kernel)),
            f"{self.prefix}{name}{up}": (kind, (shape.m, rank, *ones)),
        }
        if self.has_alpha:
            found[f"{self.prefix}{name}.alpha"] = (torch.float64, ())
        if shape.biased:
            found[f"{self.prefix}{name}.lora_B.bias"] = (kind, (shape.m,))
        return found

    def tensors(self, name: str, shape: Shape, stored: Stored) -> dict[str, Tensor]:
        """Tensors of a module by key; B (m, r) and A (r, n) in the shapes that the format gives them."""
        A, B = stored.A, stored.B
        if shape.kernel:
            A = A.reshape(A.shape[0], -1, *shape.kernel)
            B = B.reshape(*B.shape, *(1,) * len(shape.kernel))
        down, up = self._suffixes(shape)
        found = {f"{self.prefix}{name}{down}": A, f"{self.prefix}{name}{up}": B}
        if self.has_alpha:
            found[f"{self.prefix}{name}.alpha"] = _alpha(alpha_of(stored.scale, stored.rank), A.dtype)
        if shape.biased:
            bias = stored.bias if stored.bias is not None else torch.zeros(B.shape[0], dtype=B.dtype)
            found[f"{self.prefix}{name}.lora_B.bias"] = bias
        return found

    def metadata(self, ranks: Iterable[int], alphas: Iterable[float], source: Mapping[str, str]) -> dict[str, str]:
        """Metadata of the file. Hashes of a source file do not hold for a new one and are left out.

        Args:
            ranks: Rank of each module.
            alphas: alpha of each module.
            source: Metadata of the file it comes from; in kohya files what names the base model is kept.
        """
        if self.format != "kohya":
            return {"format": "pt"}
        kept = {key: source[key] for key in _KEPT_METADATA if key in source}
        return {
            "format": "pt",
            "ss_network_module": "networks.lora",
            "ss_network_dim": _one_or_dynamic(ranks),
            "ss_network_alpha": _one_or_dynamic(alphas),
            **kept,
        }

    def _suffixes(self, shape: Shape) -> tuple[str, str]:
        return (".lora_embedding_A", ".lora_embedding_B") if shape.kind == "embedding" else (self.down, self.up)


_LAYOUTS = {
    "peft": Layout("peft", PREFIX, ".lora_A.weight", ".lora_B.weight"),
    "kohya": Layout("kohya", "", ".lora_down.weight", ".lora_up.weight", has_alpha=True),
    "diffusers": Layout("diffusers", "", ".lora.down.weight", ".lora.up.weight"),
}


def layout_of(format: str) -> Layout:  # noqa: A002 - the option's name
    """The layout of a format.

    Raises:
        UsageError: An unknown format.
    """
    if format not in _LAYOUTS:
        raise UsageError("unknown output format", got=format, expected=", ".join(FORMATS))
    return _LAYOUTS[format]


def stacked(experts: Mapping[int, Stored], count: int) -> Stored:
    """Factors of all experts of one parameter in PEFT's interleaved order.

    Args:
        experts: Number -> factors B_e (m, r_e), A_e (r_e, n), at least one; missing ones become zeros.
        count: E.

    Returns:
        B (m, r E) with the expert as the inner index of its columns, A (E r, n) with it as the outer index of its rows;
        r is the largest r_e, smaller ones are padded with zeros.
    """
    one = next(iter(experts.values()))
    rank = max(stored.rank for stored in experts.values())
    A = one.A.new_zeros(count, rank, one.A.shape[1])
    B = one.B.new_zeros(one.B.shape[0], rank, count)
    for index, stored in experts.items():
        A[index, : stored.rank] = stored.A
        B[:, : stored.rank, index] = stored.B
    return Stored(B.reshape(B.shape[0], -1), A.reshape(-1, A.shape[2]), one.scale)


def alpha_of(scale: float, rank: int) -> float:
    """The alpha with alpha / rank == scale, a short decimal where there is one."""
    exact = scale * rank
    short = float(f"{exact:.12g}")
    return short if short / rank == scale else exact


def _one_or_dynamic(values: Iterable[float]) -> str:
    """The one value, or kohya's word for several."""
    distinct = set(values)
    if len(distinct) != 1:
        return "Dynamic"
    value = distinct.pop()
    return f"{int(value)}" if value == int(value) else repr(value)


def _alpha(value: float, dtype: torch.dtype) -> Tensor:
    """alpha as a scalar in the factors' dtype, or in the narrowest wider one that holds it exactly."""
    for kind in (dtype, torch.float32):
        found = torch.tensor(value, dtype=kind)
        if found.item() == value:
            return found
    return torch.tensor(value, dtype=torch.float64)
