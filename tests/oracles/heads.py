"""Oracle: what an update does to each head, written out densely in float64.

Nothing is factored, cached or streamed here: every dW is formed whole, cut into blocks with plain indices and its
Frobenius norm taken. Weights are in the (out, in) orientation; `stored` turns them into what a checkpoint holds.

Update magnitude and its relative forms after the document; grouped keys and values, circuits and spectra as the
design states them: the head's share of a block that g heads use is 1/sqrt(g) of its norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Matrix = np.ndarray
PARTS = ("q", "k", "v", "o")
EPS = 1e-12  # the document adds it to each norm of the base


@dataclass(frozen=True)
class Shape:
    """Heads of one attention: sizes of a head's rows in q and k (`qk`) and in v (`vd`, also columns of o)."""

    n_q: int
    n_kv: int
    qk: int
    vd: int

    @property
    def group(self) -> int:
        return self.n_q // self.n_kv


def fro(x: Matrix) -> float:
    """Frobenius norm, by its definition."""
    return float(np.sqrt(np.sum(np.asarray(x, dtype=np.float64) ** 2)))


def scale(rank: int, alpha: float, *, rslora: bool = False) -> float:
    """Factor of B A: alpha / r (Hu et al., 2021), with rsLoRA alpha / sqrt(r) (Kalajdzievski, 2023)."""
    return alpha / rank**0.5 if rslora else alpha / rank


def delta(B: Matrix, A: Matrix, s: float) -> Matrix:
    """s B A, dense."""
    return s * (np.asarray(B, dtype=np.float64) @ np.asarray(A, dtype=np.float64))


def stored(weight: Matrix, *, conv1d: bool = False) -> Matrix:
    """A weight as the checkpoint has it: (out, in), of a Conv1D (in, out)."""
    return weight.T.copy() if conv1d else weight


def fuse(parts: Mapping[str, Matrix], shape: Shape, how: str) -> Matrix:
    """q, k, v in one weight: `stacked` block after block, `interleaved` q, k, v of head 0, then those of head 1, ..."""
    if how == "stacked":
        return np.concatenate([parts["q"], parts["k"], parts["v"]])
    rows = []
    for h in range(shape.n_q):
        for name in ("q", "k", "v"):
            rows.append(block(parts[name], name, h, shape))
    return np.concatenate(rows)


def unfuse(weight: Matrix, shape: Shape, how: str) -> dict[str, Matrix]:
    """The reverse of `fuse`, row by row."""
    sizes = {"q": shape.qk, "k": shape.qk, "v": shape.vd}
    owners = []  # part of every row
    if how == "stacked":
        for name, heads in (("q", shape.n_q), ("k", shape.n_kv), ("v", shape.n_kv)):
            owners += [name] * heads * sizes[name]
    else:
        for _ in range(shape.n_q):
            for name in ("q", "k", "v"):
                owners += [name] * sizes[name]
    return {name: weight[[i for i, owner in enumerate(owners) if owner == name]] for name in sizes}


def block(weight: Matrix, part: str, head: int, shape: Shape) -> Matrix:
    """What query head `head` uses of a part: rows of q, k, v (of its group for k and v), columns of o."""
    if part == "o":
        return weight[:, head * shape.vd : (head + 1) * shape.vd]
    size = shape.vd if part == "v" else shape.qk
    h = head if part == "q" else head // shape.group
    return weight[h * size : (h + 1) * size]


def norms(weights: Mapping[str, Matrix], head: int, shape: Shape, *, kv_share: bool = True) -> dict[str, float]:
    """Frobenius norm of each part of a head; 0 for a part that is not there."""
    found = {}
    for part in PARTS:
        value = fro(block(weights[part], part, head, shape)) if part in weights else 0.0
        found[part] = value / shape.group**0.5 if kv_share and part in ("k", "v") else value
    return found


def update_line(
    change: Mapping[str, Matrix],
    base: Mapping[str, Matrix] | None,
    head: int,
    shape: Shape,
    *,
    kv_share: bool = True,
    biases: Mapping[str, Matrix] | None = None,
) -> dict[str, float | None]:
    """The numbers of one head: U, Urel, Urel_l2, U* and n*.

    Args:
        change: Part -> dW; parts that do not change may be missing.
        base: Part -> W0; None where it is not known.
        head: Query head.
        shape: Of the attention.
        kv_share: Whether k and v that g heads use count with 1/sqrt(g) of their norm.
        biases: Part -> change of its bias (out,): adds Ubq, Ubk, Ubv, and to U only in `U_with_bias`.
    """
    u = norms(change, head, shape, kv_share=kv_share)
    line: dict[str, float | None] = {f"U{part}": u[part] for part in PARTS}
    squares = sum(value**2 for value in u.values())
    if biases is not None:
        columns = {part: values[:, None] for part, values in biases.items()}
        ub = norms(columns, head, shape, kv_share=kv_share)
        line |= {f"Ub{part}": ub[part] for part in ("q", "k", "v")}
        line["U_with_bias"] = (squares + sum(ub[part] ** 2 for part in ("q", "k", "v"))) ** 0.5
    U = squares**0.5
    line["U"] = U
    if base is None:
        return line | {"Urel": None, "Urel_l2": None} | {f"n{part}": None for part in PARTS}
    n = norms(base, head, shape, kv_share=kv_share)
    known = min(n.values()) > 0.0
    line |= {f"n{part}": n[part] for part in PARTS}
    line["Urel"] = U / sum(n[part] + EPS for part in PARTS) if known else None
    line["Urel_l2"] = U / sum(n[part] ** 2 for part in PARTS) ** 0.5 if known else None
    return line


def update_lines(
    change: Sequence[Mapping[str, Matrix]],
    base: Sequence[Mapping[str, Matrix]] | None,
    shape: Shape,
    *,
    kv_share: bool = True,
    biases: Sequence[Mapping[str, Matrix]] | None = None,
) -> dict[tuple[int, int], dict[str, float | None]]:
    """(layer, head) -> `update_line`, for layers of one shape."""
    lines = {}
    for layer, parts in enumerate(change):
        below = None if base is None else base[layer]
        bias = None if biases is None else biases[layer]
        for head in range(shape.n_q):
            lines[layer, head] = update_line(parts, below, head, shape, kv_share=kv_share, biases=bias)
    return lines


def circuits(
    change: Mapping[str, Matrix], base: Mapping[str, Matrix], head: int, shape: Shape
) -> dict[str, float | None]:
    """Relative change of a head's OV and QK maps, ||X1 - X0|| / ||X0||.

    OV = W_o,h W_v,h (d, d), QK = W_q,h^T W_k,h (d, d). Neither moves when W_v is scaled and W_o scaled back.
    """
    now = {part: base[part] + change[part] if part in change else base[part] for part in PARTS}
    was_is = []
    for weights in (base, now):
        q, k, v, o = (block(weights[part], part, head, shape) for part in PARTS)
        was_is.append((o @ v, q.T @ k if shape.qk else None))
    (ov0, qk0), (ov1, qk1) = was_is
    return {"OV": fro(ov1 - ov0) / fro(ov0), "QK": fro(qk1 - qk0) / fro(qk0)}
