"""What a reader gives of each module: facts from the header, and how stored tensors become B (m, r) and A (r, n).

Every update is a matrix here. A convolution of kernel k (groups = 1) is flattened to n = in_channels * prod(k); an
embedding is the delta of the transposed weight, (dim, vocabulary); a stack of experts is one module an expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError
from loraforge.storage.files import TensorFile

Kind: TypeAlias = Literal["linear", "conv", "embedding", "expert"]
# What a module holds: slot ("A", "B", "mid", "alpha", "bias", "magnitude", "hada_w1_a", ...) -> key in the file.
Slots: TypeAlias = dict[str, str]
# Trained rank (None where the format has none) -> scale of the product.
Scaling: TypeAlias = Callable[[int | None], float]
Build: TypeAlias = Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class ModuleInfo:
    """What the header and the configuration say of one module.

    Attributes:
        rank: r of the factors that `load` gives (for LoHa and LoKr the implied rank).
        scaling: alpha / r, or alpha / sqrt(r) for rsLoRA.
        m: Rows of B, the outputs.
        n: Columns of A, the inputs; for a convolution in_channels times the kernel.
        dtype: Dtype of A as stored.
        fan_in_fan_out: The base layer is a Conv1D of transformers, whose weight is stored (n, m). The configuration
            says so of all linear modules at once; PEFT passes over it where the layer is an nn.Linear.
        kind: "linear", "conv", "embedding" (the base weight is stored (n, m)) or "expert".
        kernel: Kernel of a convolution, () for anything else. LoHa and LoKr without Tucker core do not state it: such a
            convolution reads as a linear module of the flattened shape. PEFT states (k, 1) for LoHa and LoKr on Conv1d.
        in_channels: Input channels of a convolution.
        group: Experts only: where the stacked factors lie in the file, such as "layers.0.experts.base_layer".
        index: Experts only: number of the expert in the stack.
        parameter: Experts only: full name of the adapted parameter, as the order of target_parameters suggests.
        has_bias: There is a bias on lora_B (lora_bias).
        has_magnitude: There is a DoRA magnitude.
    """

    rank: int
    scaling: float
    m: int
    n: int
    dtype: torch.dtype
    fan_in_fan_out: bool = False
    kind: Kind = "linear"
    kernel: tuple[int, ...] = ()
    in_channels: int | None = None
    group: str | None = None
    index: int | None = None
    parameter: str | None = None
    has_bias: bool = False
    has_magnitude: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """One module of a file.

    Attributes:
        info: Its facts.
        keys: Keys of the tensors that `build` takes, in this order.
        build: Stored tensors -> (B (m, r), A (r, n)), exact.
        bias: Key of the bias on lora_B.
        magnitude: Key of the DoRA magnitude.
    """

    info: ModuleInfo
    keys: tuple[str, ...]
    build: Build
    bias: str | None = None
    magnitude: str | None = None


@dataclass(slots=True)
class Contents:
    """Everything a reader found in a file.

    Attributes:
        format: "peft", "kohya", "diffusers" or "keymap".
        parts: module -> part.
        heads: Name without prefix -> key of a module saved in full.
        extras: Name without prefix -> key of a bias, token row or base weight.
        unknown: Keys that belong to nothing.
        notes: Sentences for the report.
        problems: What is wrong.
    """

    format: str
    parts: dict[str, Part] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    extras: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[LoraforgeError] = field(default_factory=list)


def lora_part(name: str, slots: Mapping[str, str], file: TensorFile, scaling: Scaling, fan_in_fan_out: bool) -> Part:
    """A plain LoRA module: linear, convolution (with or without a Tucker core) or embedding.

    Args:
        name: The module, for messages.
        slots: Its keys: A and B, or embedding_A and embedding_B; mid, bias and magnitude where present.
        file: The file of tensors.
        scaling: Trained rank -> scale.
        fan_in_fan_out: What the configuration says; it concerns linear modules only.

    Raises:
        LoraforgeError: A factor is missing or the shapes do not fit.
    """
    embedding = "embedding_A" in slots or "embedding_B" in slots
    key_A, key_B = _pair(name, slots, file, ("embedding_A", "embedding_B") if embedding else ("A", "B"))
    A, B = file.shapes[key_A], file.shapes[key_B]
    where = f"{file.path}: {key_A}"
    mid = slots.get("mid")
    if mid is not None and not embedding:
        return _tucker_part(slots, file, scaling)
    dims = (2,) if embedding else (2, 3, 4, 5)
    if len(A) == len(B) > 2 and B[1] and A[0] > B[1] and A[0] % B[1] == 0:
        raise LoraforgeError(
            "LoRA on a grouped convolution is not supported",
            where=where,
            got=f"A {list(A)}, B {list(B)}: {A[0] // B[1]} groups",
            expected="groups = 1",
            hint="leave this module out of the adapter; its update is block diagonal, not one product B A",
        )
    if len(A) != len(B) or len(A) not in dims or A[0] != B[1] or 0 in A + B or any(k != 1 for k in B[2:]):
        raise LoraforgeError(
            "The factors of a module do not fit",
            where=where,
            got=f"A {list(A)}, B {list(B)}",
            expected="A [r, n] and B [m, r], for convolutions A [r, in, kernel] and B [m, r, 1, ...]",
        )
    kind: Kind = "embedding" if embedding else "conv" if len(A) > 2 else "linear"
    info = ModuleInfo(
        A[0], scaling(A[0]), B[0], math.prod(A[1:]), file.dtypes[key_A], fan_in_fan_out and kind == "linear", kind,
        kernel=A[2:], in_channels=A[1] if kind == "conv" else None, has_bias="bias" in slots,
        has_magnitude="magnitude" in slots,
    )  # fmt: skip
    return finish(Part(info, (key_A, key_B), _flatten, slots.get("bias"), slots.get("magnitude")), file)


def finish(part: Part, file: TensorFile) -> Part:
    """The part itself once its bias and magnitude are found to have one entry an output.

    Raises:
        LoraforgeError: They have another shape, or the magnitude is one of the inputs.
    """
    for key, what in ((part.bias, "bias of lora_B"), (part.magnitude, "DoRA magnitude")):
        if key is None:
            continue
        shape, m = file.shapes[key], part.info.m
        # PEFT stores (1, m, 1, 1) for convolutions; in other files that shape means one number an input.
        by_output = len(shape) == 1 or shape[:1] == (m,) or "lora_magnitude_vector" in key
        if math.prod(shape) != m or not by_output:
            raise LoraforgeError(
                f"The {what} of a module does not fit",
                where=f"{file.path}: {key}",
                got=list(shape),
                expected=f"one number an output, {m}; magnitudes of the inputs are not supported",
            )
    return part


def checked_use(name: str, slots: Mapping[str, str], part: Part) -> Part:
    """The part itself once every tensor of the module is found to be used by it.

    Raises:
        LoraforgeError: The module mixes kinds of factors.
    """
    left = set(slots.values()) - {*part.keys, part.bias, part.magnitude}
    if left:
        raise LoraforgeError(
            f"Module '{name}' mixes factors of several kinds",
            got=", ".join(sorted(slots.values())),
            expected="the factors of one kind",
        )
    return part


def _flatten(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """A (r, in, kernel) -> (r, n), B (m, r, 1, ...) -> (m, r); matrices stay as they are."""
    A, B = tensors
    return B.flatten(1), A.flatten(1)


def _tucker_part(slots: Mapping[str, str], file: TensorFile, scaling: Scaling) -> Part:
    """A convolution as down (r, in, 1, 1), mid (r', r, kernel), up (m, r', 1, 1): mid is folded into down."""
    keys = (slots["A"], slots["B"], slots["mid"])
    A, B, mid = (file.shapes[key] for key in keys)
    fits = len(mid) > 2 and len(A) >= 2 and len(B) >= 2 and mid[0] == B[1] and mid[1] == A[0] and 0 not in A + B + mid
    if not fits or any(k != 1 for k in A[2:] + B[2:]):
        raise LoraforgeError(
            "The factors of a convolution do not fit",
            where=f"{file.path}: {keys[2]}",
            got=f"down {list(A)}, mid {list(mid)}, up {list(B)}",
            expected="down [r, in, 1, 1], mid [r, r, kernel], up [m, r, 1, 1]",
        )
    info = ModuleInfo(
        mid[0], scaling(A[0]), B[0], A[1] * math.prod(mid[2:]), file.dtypes[keys[0]], kind="conv", kernel=mid[2:],
        in_channels=A[1], has_bias="bias" in slots, has_magnitude="magnitude" in slots,
    )  # fmt: skip
    return finish(Part(info, keys, _fold_mid, slots.get("bias"), slots.get("magnitude")), file)


def _fold_mid(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """A'[i, (c, k)] = sum_j mid[i, j, k] A[j, c], in float32 at least."""
    A, B, mid = (widened(t) for t in tensors)
    return B.flatten(1), tucker(mid, A.flatten(1))


def tucker(core: Tensor, inner: Tensor) -> Tensor:
    """Core (r', r, kernel) times inner (r, in) -> (r', in * prod(kernel)), laid out as a flattened convolution."""
    return torch.einsum("ijk,jc->ick", core.flatten(2), inner).flatten(1)


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32 or wider: a product of half-precision factors would round."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _pair(name: str, slots: Mapping[str, str], file: TensorFile, sides: tuple[str, str]) -> tuple[str, str]:
    """Keys of both factors.

    Raises:
        LoraforgeError: One is missing.
    """
    missing = [side for side in sides if side not in slots]
    if not missing:
        return slots[sides[0]], slots[sides[1]]
    have = next((side for side in sides if side in slots), None)
    held = f"has lora_{have} but no lora_{missing[0]}" if have else "has no LoRA factors"
    raise LoraforgeError(
        f"Module '{name}' {held}",
        where=f"{file.path}: {slots[have] if have else ', '.join(slots.values())}",
        expected="both factors",
        hint="the file is incomplete; save or copy the adapter again",
    )
