"""How much the circuits of a head change: what it writes for what it reads (OV), and what attends to what (QK).

    OV_h = W_o,h W_v,h (d x d),    QK_h = W_q,h^T W_k,h (d x d),    change = ||circuit' - circuit||_F / ||circuit||_F

Both are what a head computes and do not change when W_v,h is scaled by c and W_o,h by 1/c (or W_q and W_k), which moves
the norms of the four matrices as it likes. With dW_o,h = s B A_h and the like the change has rank r + r':

    (W_o + dW_o)(W_v + dW_v) - W_o W_v = [B_o, W_o B_v + B_o A_o B_v] [A_o W_v ; A_v]     (scalings folded into B)

so that its norm comes from two QR decompositions; no d x d matrix is formed. With rotary positions, or a norm on q and
k, the scores are no bilinear form with one matrix for all distances: QK then compares the weights alone.

Source of the circuits: Elhage et al., A Mathematical Framework for Transformer Circuits (2021).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from loraforge.measure.heads.layout import Attention
from loraforge.measure.updates.slices import Change, head_slice, triangle
from loraforge.types import LowRank

# Output circuit and attention circuit: their left and right parts.
CIRCUITS = {"OV": ("o", "v"), "QK": ("q", "k")}


def circuit_changes(
    attention: Attention, weights: Mapping[str, Tensor], changes: Mapping[str, Change | None]
) -> dict[str, list[float | None]]:
    """Relative change of both circuits of every query head of an attention.

    Args:
        attention: Its places.
        weights: Module -> W0 (out, in), of all projections that the layout names.
        changes: Module -> its update; None or absent where it has none.

    Returns:
        `OV` and `QK`, one number a query head; None where the circuit is zero or has no rows a head.
    """
    found: dict[str, list[float | None]] = {}
    for name, pair in CIRCUITS.items():
        if any(attention.part(part) is None for part in pair):
            found[name] = [None] * attention.n_q
            continue
        found[name] = [
            _left_right(name, *(_side(attention, part, head, weights, changes) for part in pair))
            for head in range(attention.n_q)
        ]
    return found


def _side(
    attention: Attention, part: str, head: int, weights: Mapping[str, Tensor], changes: Mapping[str, Change | None]
) -> tuple[Tensor, Change | None]:
    """A head's slice of the weight of a part, and of its update."""
    place, span = attention.part(part), attention.span(part, head)
    assert place is not None and span is not None  # the caller passed over those
    update = changes.get(place.module)
    weight = weights[place.module]
    index = head // attention.group if part in ("k", "v") else head
    own = weight[:, span] if part == "o" else weight[span]
    return own, None if update is None else head_slice(update, place, part, index)


def _left_right(name: str, left: tuple[Tensor, Change | None], right: tuple[Tensor, Change | None]) -> float | None:
    """The relative change of a circuit of one head from its two (weight, update) sides."""
    weight, update = left
    if name == "QK":  # W_q,h has the head as rows: the left factor of the circuit is its transpose
        weight, update = weight.mT, None if update is None else _transposed(update)
    return relative_change(weight, update, *right)


def relative_change(
    left: Tensor, left_change: Change | None, right: Tensor, right_change: Change | None
) -> float | None:
    """||(L + dL)(R + dR) - L R||_F / ||L R||_F.

    Args:
        left: (d, k).
        left_change: Its update, or None.
        right: (k, d').
        right_change: Its update, or None.

    Returns:
        The relative change; None where L R is zero.
    """
    left, right = left.to(torch.float64), right.to(torch.float64)
    # The Gram matrices suffice here: only where the circuit nearly vanishes would a square root of rounding show.
    square = float(((left.mT @ left) * (right @ right.mT)).sum())
    if square <= 0.0:
        return None
    columns: list[Tensor] = []
    rows: list[Tensor] = []
    if left_change is not None:
        # dL (R + dR), with dL = B A as factors or B = dL, A = 1.
        B, A = _factors(left_change, left.shape[1])
        moved = A @ right
        if right_change is not None:
            B_r, A_r = _factors(right_change, right.shape[0])
            moved = moved + (A @ B_r) @ A_r
        columns.append(B)
        rows.append(moved)
    if right_change is not None:
        B_r, A_r = _factors(right_change, right.shape[0])
        columns.append(left @ B_r)
        rows.append(A_r)
    if not columns:
        return 0.0
    value = torch.linalg.matrix_norm(triangle(torch.cat(columns, 1)) @ triangle(torch.cat(rows).mT).mT)
    return float(value) / math.sqrt(square)


def _factors(change: Change, inner: int) -> tuple[Tensor, Tensor]:
    """An update as B, A in float64, the scaling in B; a matrix as itself times the identity on its shorter side."""
    if isinstance(change, LowRank):
        return change.B.to(torch.float64) * change.scaling, change.A.to(torch.float64)
    matrix = change.to(torch.float64)
    eye = torch.eye(inner, dtype=torch.float64)
    return (matrix, eye) if matrix.shape[1] == inner else (eye, matrix)


def _transposed(change: Change) -> Change:
    return LowRank(change.A.mT, change.B.mT, change.scaling) if isinstance(change, LowRank) else change.mT
