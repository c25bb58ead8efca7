"""Geometric mean: the rSVD document's element-wise rule on the factors, for adapters of one rank.

    B = s sign(prod_i B_i) |prod_i B_i|^(1/N),   A = sign(prod_i A_i) |prod_i A_i|^(1/N),   s = prod_i |s_i|^(1/N),

products entry by entry, N = 2 in the document. The factors of a delta are not unique, so the result depends on how each
adapter happens to be factorised, and for even N entries that agree on a negative sign come out positive. It makes sense
for adapters that started from one initialisation, at best.

`variant=code` is the document's published code for two adapters: roots of |x| + 1e-8, and A takes the sign of A_1.
`align=true` is ours: all deltas are written as C_i between the left singular vectors of [D_1 .. D_N] and the right ones
of [D_1; ..; D_N], which no re-factorisation of an adapter changes, and the geometric mean of the C_i is taken entry by
entry where all have one sign; it is 0 where they have not.

Source: the rSVD document, section "Geometric Mean Merge". Cost: one pass over the factors; aligned (m + n) R^2 + N R^3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError
from loraforge.linalg.bases import column_signs
from loraforge.linalg.core import core_of
from loraforge.merging.document_params import GeometricMeanParams
from loraforge.types import LayerInputs, LowRank, Update

CODE_EPS = 1e-8


def merge_layer(layer: LayerInputs, params: GeometricMeanParams) -> Update:
    """Geometric mean of one module; weights are not used.

    Args:
        layer: Factors of the module, all of rank r unless `align`.
        params: Which form.

    Returns:
        B (m, r), A (r, n); aligned at most rank R. Zero where an adapter lacks the module and its delta counts as 0.

    Raises:
        LoraforgeError: Ranks differ, or the code's form is asked for with more than two adapters.
    """
    if params.align:
        return _aligned(layer)
    pairs = [f for f in layer.factors if isinstance(f, LowRank)]
    if len(pairs) != len(layer.present):
        raise LoraforgeError("geometric-mean works on factors, not on full checkpoints", where=layer.module)
    ranks = [pair.rank for pair in pairs]
    if len(set(ranks)) > 1:
        raise LoraforgeError(
            "geometric-mean works on the factors entry by entry and needs equal ranks",
            where=layer.module,
            got=" and ".join(map(str, ranks)),
            expected="one rank",
            hint="--set align=true takes any ranks",
        )
    wide = any(t.dtype == torch.float64 for pair in pairs for t in (pair.B, pair.A))
    dtype = torch.float64 if wide else torch.float32
    Bs, As = [pair.B.to(dtype) for pair in pairs], [pair.A.to(dtype) for pair in pairs]
    if len(pairs) < layer.count:
        return LowRank(torch.zeros_like(Bs[0]), As[0])
    scale = math.prod(abs(pair.scaling) for pair in pairs) ** (1 / len(pairs))
    if params.variant == "code":
        return _as_published(layer, Bs, As, scale)
    return LowRank(_root(Bs) * scale, _root(As))


def _root(factors: list[Tensor]) -> Tensor:
    """sign(prod) |prod|^(1/N) entry by entry; a product of roots, so that small entries do not underflow."""
    root = torch.ones_like(factors[0])
    for factor in factors:
        root = root * factor.sign() * factor.abs().pow(1 / len(factors))
    return root


def _as_published(layer: LayerInputs, Bs: list[Tensor], As: list[Tensor], scale: float) -> LowRank:
    if len(Bs) > 2:
        raise LoraforgeError("variant=code merges two adapters", where=layer.module, got=f"{len(Bs)} adapters")
    if len(Bs) == 1:
        return LowRank(Bs[0] * scale, As[0])
    B = (Bs[0] * Bs[1]).sign() * ((Bs[0] * Bs[1]).abs() + CODE_EPS).sqrt()
    A = As[0].sign() * (As[1] != 0) * ((As[0] * As[1]).abs() + CODE_EPS).sqrt()
    return LowRank(B * scale, A)


def _aligned(layer: LayerInputs) -> Update:
    """The mean of the cores in a basis that depends on the deltas alone."""
    core = core_of(layer, weighted=False)
    if len(core.present) < layer.count:
        return core.lift(torch.zeros_like(core.present[0]))
    left = torch.linalg.svd(torch.cat(core.present, dim=1), full_matrices=False).U
    right = torch.linalg.svd(torch.cat(core.present, dim=0), full_matrices=False).Vh.T
    left = left * column_signs(left if core.left is None else core.left @ left)
    right = right * column_signs(right if core.right is None else core.right @ right)
    blocks = torch.stack([left.T @ block @ right for block in core.present])
    agree = (blocks > 0).all(dim=0) | (blocks < 0).all(dim=0)
    root = blocks.abs().pow(1 / len(blocks)).prod(dim=0)
    mean = torch.where(agree, blocks[0].sign() * root, 0.0)
    return core.lift(left @ mean @ right.T)
