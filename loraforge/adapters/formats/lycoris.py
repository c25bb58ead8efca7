"""LoHa and LoKr modules as exact LoRA factors.

LoHa: delta = s (W1 o W2), W_i = a_i b_i of rank r. Elementwise products of low-rank matrices have low rank:
(a_1 b_1) o (a_2 b_2) = B A with B[:, (i, j)] = a_1[:, i] a_2[:, j] and A[(i, j), :] = b_1[i] b_2[j], rank r^2.
LoKr: delta = s (W1 x W2) (Kronecker), and (a_1 b_1) x (a_2 b_2) = (a_1 x a_2)(b_1 x b_2), rank r_1 r_2.
A Tucker core t of a convolution is folded into the inner factor first. Where the implied rank exceeds m or n, the dense
delta beside an identity is the smaller exact pair.

Source: FedPara (arXiv:2108.06098), LyCORIS (arXiv:2309.14859). Cost: (m + n) r multiplications, r the implied rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from loraforge.adapters.formats.parts import Build, ModuleInfo, Part, Scaling, finish, tucker, widened
from loraforge.errors import LoraforgeError
from loraforge.storage.files import TensorFile

# Above this the factors are no low-rank update any more and a merge would work on nearly dense matrices.
IMPLIED_RANK_CAP = 1024

LOHA_SLOTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR_SLOTS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


def lycoris_part(name: str, slots: Mapping[str, str], file: TensorFile, scaling: Scaling) -> Part:
    """A LoHa or LoKr module.

    Args:
        name: The module, for messages.
        slots: Its keys, `LOHA_SLOTS` or `LOKR_SLOTS`; magnitude where present.
        file: The file of tensors.
        scaling: Trained rank -> scale; None is asked for where LoKr has no low-rank factor.

    Raises:
        LoraforgeError: A factor is missing, the shapes do not fit, or the implied rank is above the cap.
    """
    is_loha = any(slot in slots for slot in LOHA_SLOTS)
    used = [slot for slot in (LOHA_SLOTS if is_loha else LOKR_SLOTS) if slot in slots]
    shapes = {slot: file.shapes[slots[slot]] for slot in used}
    described = "LoHa" if is_loha else "LoKr"
    try:
        m, n, rank, trained = (_loha_sizes if is_loha else _lokr_sizes)(shapes)
    except (KeyError, IndexError, ValueError) as error:
        raise LoraforgeError(
            f"The {described} factors of module '{name}' do not fit or are incomplete",
            where=f"{file.path}: {slots[used[0]]}",
            got=", ".join(f"{slot} {list(shape)}" for slot, shape in shapes.items()),
            expected="w1_a, w1_b, w2_a, w2_b (both t1 and t2 with Tucker cores)"
            if is_loha
            else "w1 or w1_a and w1_b; w2 or w2_a and w2_b (t2 with a Tucker core)",
        ) from error
    rank = min(rank, m, n)
    if rank > IMPLIED_RANK_CAP:
        raise LoraforgeError(
            f"Module '{name}' is a {described} update of too high rank to be read as LoRA factors",
            where=f"{file.path}: {slots[used[0]]}",
            got=f"implied rank {rank}",
            expected=f"at most {IMPLIED_RANK_CAP}",
            hint="merge it into the base model with the tool that trained it, or train with a smaller dim",
        )
    core = shapes.get("hada_t1", shapes.get("lokr_t2", shapes.get("lokr_w2", ())))
    kernel = tuple(core[2:])
    info = ModuleInfo(
        rank, scaling(trained), m, n, file.dtypes[slots[used[0]]], kind="conv" if kernel else "linear", kernel=kernel,
        in_channels=n // math.prod(kernel) if kernel else None, has_magnitude="magnitude" in slots,
    )  # fmt: skip
    keys = tuple(slots[slot] for slot in used)
    return finish(Part(info, keys, _builder(used, is_loha, rank), magnitude=slots.get("magnitude")), file)


def _builder(used: Sequence[str], is_loha: bool, rank: int) -> Build:
    """Stored tensors in the order of `used` -> (B, A) of the given rank."""

    def build(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        given = {slot: widened(tensor) for slot, tensor in zip(used, tensors, strict=True)}
        (B1, A1), (B2, A2) = (_sides(given, "hada" if is_loha else "lokr", i) for i in (1, 2))
        if not is_loha:
            return torch.kron(B1.contiguous(), B2.contiguous()), torch.kron(A1.contiguous(), A2.contiguous())
        m, n = B1.shape[0], A1.shape[1]
        if B1.shape[1] * B2.shape[1] > rank:
            dense = (B1 @ A1) * (B2 @ A2)
            eye = torch.eye(rank, dtype=dense.dtype)
            return (eye, dense) if m <= n else (dense, eye)
        B = (B1[:, :, None] * B2[:, None, :]).reshape(m, -1)
        return B, (A1[:, None, :] * A2[None, :, :]).reshape(-1, n)

    return build


def _sides(given: Mapping[str, Tensor], family: str, i: int) -> tuple[Tensor, Tensor]:
    """W_i as a product of two matrices; a full W_i stands beside an identity on its shorter side."""
    full, core = given.get(f"{family}_w{i}"), given.get(f"{family}_t{i}")
    if full is not None:
        matrix = full.flatten(1)
        rows, columns = matrix.shape
        eye = torch.eye(min(rows, columns), dtype=matrix.dtype)
        return (eye, matrix) if rows <= columns else (matrix, eye)
    outer, inner = given[f"{family}_w{i}_a"], given[f"{family}_w{i}_b"]
    # With a Tucker core both factors are stored rank first.
    return (outer, inner.flatten(1)) if core is None else (outer.T, tucker(core, inner))


def _loha_sizes(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int, int]:
    """(m, n, implied rank, trained rank) of a LoHa module."""
    (m, n, r1), (m2, n2, r2) = (_product_sizes(shapes, "hada", i) for i in (1, 2))
    if (m, n) != (m2, n2) or ("hada_t1" in shapes) != ("hada_t2" in shapes):
        raise ValueError("the two products differ")
    return m, n, r1 * r2, r1


def _lokr_sizes(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int, int | None]:
    """(m, n, implied rank, trained rank or None) of a LoKr module."""
    sizes, trained = [], None
    for i in (1, 2):
        full = shapes.get(f"lokr_w{i}")
        if full is None:
            sizes.append(_product_sizes(shapes, "lokr", i))
            trained = shapes[f"lokr_w{i}_b"][0]
            continue
        rows, columns = full[0], math.prod(full[1:])
        if len(full) < 2 or not rows * columns or f"lokr_w{i}_a" in shapes or f"lokr_w{i}_b" in shapes:
            raise ValueError("a full factor and low-rank ones")
        sizes.append((rows, columns, min(rows, columns)))
    (m1, n1, r1), (m2, n2, r2) = sizes
    return m1 * m2, n1 * n2, r1 * r2, trained


def _product_sizes(shapes: Mapping[str, tuple[int, ...]], family: str, i: int) -> tuple[int, int, int]:
    """(rows, columns, rank) of the product w_i_a w_i_b, or of core, w_i_a, w_i_b."""
    a, b, core = shapes[f"{family}_w{i}_a"], shapes[f"{family}_w{i}_b"], shapes.get(f"{family}_t{i}")
    if core is None:
        if len(a) != 2 or a[1] != b[0] or 0 in a + b:
            raise ValueError("inner sizes differ")
        return a[0], math.prod(b[1:]), a[1]
    if len(a) != 2 or len(b) != 2 or core[:2] != (a[0], b[0]) or 0 in a + b + core or len(core) < 3:
        raise ValueError("the core does not fit")
    return a[1], b[1] * math.prod(core[2:]), a[0]
