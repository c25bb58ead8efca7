"""IterIS and IterIS++ in dense numpy float64, straight from the equations. Independent of the package.

Rows are tokens, y = x W^T. Shape letters: N tasks, n = d_in, m = d_out, S_i tokens of task i.
X[i] (S_i, n) input of the module in task model i, Xt[i] (S_i, n) the same tokens in the merged model,
deltas[i] (m, n) or None (the adapter lacks the module: its delta is 0), W0 (m, n) frozen weight.

    minimise  sum_i c_i lambda_i || D_i^{1/2} (X_i W_i^T - Xt_i W^T) ||_F^2
    C_i = X_i^T D_i Xt_i,   G_i = Xt_i^T D_i Xt_i
    T1  = sum_i c_i lambda_i W_i (C_i + Q_i),   T2 = sum_i c_i lambda_i (G_i + Lambda_i),   W = T1 T2^{-1}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Camr:
    """Curvature-aware regularisation. alpha None = alpha_2 of the solve. The document's code is sum + abs + iso."""

    alpha: float | None = None
    beta: float = 1e-8
    direction: str = "document"  # document: more where the variance is high | inverse
    normalize: str = "mean"  # mean | sum | max
    scale: str = "fro"  # fro: times ||G_i||_F (alpha and beta) | abs
    cross: str = "matched"  # matched: Q_i = Lambda_i | none: Q_i = 0 | iso: Q_i = alpha_1 ||C_i||_F I


@dataclass(frozen=True)
class Dcs:
    """Conflict-aware token weights. min_ess 0 is the document's literal formula."""

    scale: float = 1.0
    min_ess: float = 0.25
    kernel: str = "gaussian"  # gaussian: exp(-V / sigma^2) | excess: exp(-max(0, V - median) / (1.4826 MAD scale))
    mad_consistent: bool = False
    normalize: str = "pooled"  # mean 1 over all tokens | "task": mean 1 within each task


@dataclass(frozen=True)
class DcsWeights:
    """w[i] (S_i,) token weights; sigma, tau and the effective sample size (sum w)^2 / sum w^2 of the pooled tokens."""

    w: list[Array]
    sigma: float
    tau: float
    ess: float


@dataclass(frozen=True)
class Solution:
    """W (m, n) = T1 T2^{-1} and all that went into it (lists hold one entry a task)."""

    W: Array
    T1: Array
    T2: Array
    lam: Array
    w: list[Array]
    C: list[Array]
    G: list[Array]
    Lambda: list[Array]
    targets: list[Array]
    dcs: DcsWeights | None


def fill(deltas: Sequence[Array | None]) -> list[Array]:
    """Deltas with 0 in place of None."""
    shape = next(d.shape for d in deltas if d is not None)
    return [np.zeros(shape) if d is None else np.asarray(d, dtype=np.float64) for d in deltas]


def task_weight(W: Array, X: Array) -> float:
    """lambda_i = ||W_i||_F^2 / ||X_i W_i^T||_F^2; 0 where W_i X_i^T is exactly 0 (a task with nothing to keep)."""
    out = float(np.sum((X @ W.T) ** 2))
    return float(np.sum(W**2)) / out if out != 0 else 0.0


def task_weights(X: Sequence[Array], deltas: Sequence[Array | None], W0: Array | None, mode: str = "full") -> Array:
    """lambda (N,): `full` uses W0 + Delta_i, `delta` uses Delta_i, `one` is 1 for every task."""
    if mode == "one":
        return np.ones(len(X))
    if mode == "full" and W0 is None:
        raise ValueError("lambda 'full' needs W0")
    shift = W0 if mode == "full" else 0.0
    return np.array([task_weight(d + shift, x) for d, x in zip(fill(deltas), X, strict=True)])


def mix_features(X: Array, Xt: Array, rho: float) -> Array:
    """reg_ceof: Xt <- (1 - rho) Xt + rho X, before anything else is computed from Xt."""
    return (1.0 - rho) * Xt + rho * X


def grams(X: Array, Xt: Array, w: Array | None = None) -> tuple[Array, Array]:
    """(C, G) = (X^T D Xt, Xt^T D Xt), D = diag(w)."""
    weighted = Xt if w is None else Xt * w[:, None]
    return X.T @ weighted, Xt.T @ weighted


def camr_diagonal(Xt: Array, G_norm: float, camr: Camr, alpha: float, w: Array | None = None) -> Array:
    """Diagonal of Lambda_i = scale * (alpha * Normalize(g) + beta), g_c = sum_s w_s Xt_{s,c}^2 (w once, not squared).

    document: g/mean g, g/sum g, g/max g. inverse: v = 1 - g/sum g as published (`sum`), v/mean v, v/max v.
    """
    g = np.sum(Xt**2 if w is None else w[:, None] * Xt**2, axis=0)
    shape = g / g.sum()
    if camr.direction == "inverse":
        shape = 1.0 - shape
    if camr.normalize == "mean":
        shape = shape / shape.mean()
    elif camr.normalize == "max":
        shape = shape / shape.max()
    return (G_norm if camr.scale == "fro" else 1.0) * (alpha * shape + camr.beta)


def dcs_variance(X: Array, deltas: Sequence[Array | None]) -> Array:
    """V_s = (1/N) sum_j ||W_j x_s - mean_k W_k x_s||^2, (S,). W0 cancels, so deltas are enough; raw sum over d_out."""
    outs = np.stack([X @ d.T for d in fill(deltas)])
    return np.mean(np.sum((outs - outs.mean(axis=0)) ** 2, axis=2), axis=0)


def effective_size(w: Array) -> float:
    """(sum w)^2 / sum w^2."""
    return float(w.sum() ** 2 / np.sum(w**2))


def dcs_weights(V: Sequence[Array], dcs: Dcs) -> DcsWeights:
    """Token weights of all tasks of a module; median, MAD, tau and ESS are pooled over the tasks.

    sigma = MAD * scale (averaged medians; times 1.4826 with `mad_consistent`); exponent e = V / sigma^2 shifted by its
    minimum (a common factor, removed again by the mean-1 step); w = exp(-e / tau) with the smallest tau >= 1 whose ESS
    is at least min_ess * S. A spread of 0 measures no conflict: all weights are 1.
    """
    pooled = np.concatenate(list(V))
    median = np.median(pooled)
    mad = float(np.median(np.abs(pooled - median)))
    if dcs.kernel == "excess":
        sigma = 1.4826 * mad * dcs.scale
        excess = np.maximum(0.0, pooled - median)
        e = excess / sigma if sigma > 0 else np.zeros_like(pooled)
    else:
        sigma = mad * dcs.scale * (1.4826 if dcs.mad_consistent else 1.0)
        e = pooled / sigma**2 if sigma > 0 else np.zeros_like(pooled)
    e = e - e.min()

    def at(tau: float) -> Array:
        return np.exp(-e / tau)

    floor, low, high = dcs.min_ess * len(e), 1.0, 1.0
    if effective_size(at(1.0)) < floor:  # ESS grows with tau: log-ESS falls along beta = 1/tau
        while effective_size(at(high)) < floor:
            low, high = high, 2.0 * high
        for _ in range(200):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if effective_size(at(middle)) < floor else (low, middle)
    w = at(high)
    parts = np.split(w / w.mean(), np.cumsum([len(v) for v in V])[:-1])
    if dcs.normalize == "task":
        parts = [p / p.mean() for p in parts]
    return DcsWeights(parts, sigma, high, effective_size(w))


def solve(
    X: Sequence[Array],
    Xt: Sequence[Array],
    deltas: Sequence[Array | None],
    *,
    W0: Array | None = None,
    c: Sequence[float] | None = None,
    lam: str | Sequence[float] = "full",
    alpha_1: float = 1e-7,
    alpha_2: float = 1e-7,
    reg_ceof: float = 0.0,
    with_pretrain_matrix: int = 0,
    camr: Camr | None = None,
    dcs: Dcs | Sequence[Array] | None = None,
) -> Solution:
    """The dense solve of one module with everything switchable; see the module docstring for the equations.

    with_pretrain_matrix 0: W_i = Delta_i and W is the merged delta; 1: W_i = W0 + Delta_i and W is the full weight.
    `lam` may be the numbers themselves; `dcs` may be the token weights themselves. lambda never sees them.
    """
    if W0 is None and (with_pretrain_matrix or (isinstance(lam, str) and lam == "full")):
        raise ValueError("W0 is needed for lambda 'full' and for with_pretrain_matrix 1")
    D = fill(deltas)
    n = D[0].shape[1]
    lams = task_weights(X, D, W0, lam) if isinstance(lam, str) else np.asarray(lam, dtype=np.float64)
    a = lams * (np.ones(len(D)) if c is None else np.asarray(c, dtype=np.float64))
    weights = dcs_weights([dcs_variance(x, D) for x in X], dcs) if isinstance(dcs, Dcs) else None
    w = [np.ones(len(x)) for x in X] if dcs is None else weights.w if weights else [np.asarray(v) for v in dcs]
    targets = [d + W0 for d in D] if with_pretrain_matrix and W0 is not None else D
    T1, T2 = np.zeros(D[0].shape), np.zeros((n, n))
    Cs, Gs, Ls = [], [], []
    for i, x in enumerate(X):
        xt = mix_features(x, Xt[i], reg_ceof)
        C, G = grams(x, xt, w[i])
        if camr is None:
            Lambda = alpha_2 * np.linalg.norm(G) * np.ones(n)
        else:
            alpha = alpha_2 if camr.alpha is None else camr.alpha
            Lambda = camr_diagonal(xt, float(np.linalg.norm(G)), camr, alpha, w[i])
        Q = alpha_1 * np.linalg.norm(C) * np.ones(n)
        if camr is not None and camr.cross != "iso":
            Q = Lambda if camr.cross == "matched" else np.zeros(n)
        T1 += a[i] * targets[i] @ (C + np.diag(Q))
        T2 += a[i] * (G + np.diag(Lambda))
        Cs.append(C)
        Gs.append(G)
        Ls.append(Lambda)
    return Solution(np.linalg.solve(T2.T, T1.T).T, T1, T2, lams, w, Cs, Gs, Ls, list(targets), weights)


def solve_dense(X: Sequence[Array], Xt: Sequence[Array], deltas: Sequence[Array | None], **options: object) -> Array:
    """W (m, n) of `solve`, same options."""
    return solve(X, Xt, deltas, **options).W  # type: ignore[arg-type]


def objective(
    W: Array,
    X: Sequence[Array],
    Xt: Sequence[Array],
    targets: Sequence[Array],
    a: Sequence[float],
    w: Sequence[Array] | None = None,
) -> float:
    """sum_i a_i sum_s w_{i,s} ||W_i x_s - W xt_s||^2 with a_i = c_i lambda_i. On other samples: the held-out value."""
    total = 0.0
    for i, x in enumerate(X):
        error = np.sum((x @ targets[i].T - Xt[i] @ W.T) ** 2, axis=1)
        total += a[i] * float(np.sum(error if w is None else error * w[i]))
    return total


def relative_objective(
    W: Array, X: Sequence[Array], Xt: Sequence[Array], targets: Sequence[Array], a: Sequence[float]
) -> float:
    """`objective` over its value at W = 0, i.e. over sum_i a_i ||X_i W_i^T||^2."""
    return objective(W, X, Xt, targets, a) / objective(np.zeros_like(W), X, Xt, targets, a)


def held_out_from_grams(
    W: Array, C: Sequence[Array], G: Sequence[Array], targets: Sequence[Array], a: Sequence[float]
) -> float:
    """sum_i a_i [tr(W G_i W^T) - 2 tr(W C_i^T W_i^T)]: the held-out objective less a constant that W does not move."""
    terms = [np.trace(W @ g @ W.T) - 2.0 * np.trace(W @ k.T @ t.T) for k, g, t in zip(C, G, targets, strict=True)]
    return float(np.dot(a, terms))


@dataclass(frozen=True)
class Anderson:
    """Type II Anderson mixing (MATS). The document's settings are history 5, reg 1e-6 absolute."""

    history: int = 5
    reg: float = 1e-6
    reg_mode: str = "relative"  # relative: reg * trace(dR^T dR) / columns | absolute: reg
    clamp: float | None = None
    growth_guard: float | None = None  # take G where ||W_next - G|| > guard * ||G||


def anderson_next(W: Sequence[Array], G: Sequence[Array], rule: Anderson) -> Array:
    """W_{k+1} = G_k - dG gamma, (dR^T dR + reg I) gamma = dR^T R_k, from all pairs (W_j, G_j = G(W_j)) up to k.

    R_j = G_j - W_j; columns of dR and dG are differences of successive entries, the newest min(history, k) of them.
    """
    shape = np.shape(G[-1])
    w = [np.ravel(x) for x in W[-rule.history - 1 :]]
    g = [np.ravel(x) for x in G[-rule.history - 1 :]]
    r = [b - a for a, b in zip(w, g, strict=True)]
    if len(r) == 1:
        return np.array(G[-1], dtype=np.float64)
    dR = np.stack([b - a for a, b in zip(r[:-1], r[1:], strict=True)], axis=1)
    dG = np.stack([b - a for a, b in zip(g[:-1], g[1:], strict=True)], axis=1)
    K = dR.T @ dR
    reg = rule.reg * (np.trace(K) / len(K) if rule.reg_mode == "relative" else 1.0)
    system, right = K + reg * np.eye(len(K)), dR.T @ r[-1]
    # A history that has stopped moving gives K = 0: the least-norm solution then leaves G as it is.
    gamma = np.linalg.lstsq(system, right, rcond=None)[0] if not system.any() else np.linalg.solve(system, right)
    if rule.clamp is not None:
        gamma = np.clip(gamma, -rule.clamp, rule.clamp)
    new = g[-1] - dG @ gamma
    if rule.growth_guard is not None and np.linalg.norm(new - g[-1]) > rule.growth_guard * np.linalg.norm(g[-1]):
        new = g[-1]
    return new.reshape(shape)


def truncate_frobenius(W: Array, k: int) -> Array:
    """The rank-k matrix nearest to W in ||.||_F."""
    U, s, Vh = np.linalg.svd(W, full_matrices=False)
    return (U[:, :k] * s[:k]) @ Vh[:k]


def truncate_output(W: Array, T2: Array, k: int) -> Array:
    """The rank-k Z with the least ||(W - Z) T2^{1/2}||_F: truncate W T2^{1/2}, then undo the root. T2 SPD."""
    values, vectors = np.linalg.eigh(T2)
    root, inverse = (vectors * np.sqrt(values)) @ vectors.T, (vectors / np.sqrt(values)) @ vectors.T
    return truncate_frobenius(W @ root, k) @ inverse


@dataclass(frozen=True)
class ToyNet:
    """h <- f(h (W0_l + delta_l)^T) [+ h], l running through `order` (None: each module once; repeats tie weights)."""

    W0: Sequence[Array]
    order: Sequence[int] | None = None
    residual: bool = False
    activation: str = "tanh"  # tanh | relu | identity

    @property
    def steps(self) -> list[int]:
        """Module index at each depth."""
        return list(range(len(self.W0))) if self.order is None else list(self.order)

    def inputs(self, x: Array, deltas: Sequence[Array | None]) -> list[Array]:
        """Input rows of every module (all its uses stacked) when `deltas` are added to the frozen weights."""
        f = {"tanh": np.tanh, "relu": lambda z: np.maximum(z, 0.0), "identity": lambda z: z}[self.activation]
        seen: list[list[Array]] = [[] for _ in self.W0]
        for step in self.steps:
            seen[step].append(x)
            d = deltas[step]
            y = f(x @ (self.W0[step] if d is None else self.W0[step] + d).T)
            x = x + y if self.residual else y
        return [np.concatenate(rows) for rows in seen]


def _merged_delta(net: ToyNet, module: int, X: list, Xt: list, adapters: list, options: dict) -> Array:
    """Merged delta of one module (mode 1: the full weight minus W0)."""
    W0 = net.W0[module]
    W = solve_dense(X, Xt, [a[module] for a in adapters], W0=W0, **options)
    return W - W0 if options.get("with_pretrain_matrix") else W


def jacobi(
    net: ToyNet,
    xs: Sequence[Array],
    adapters: Sequence[Sequence[Array | None]],
    solves: int,
    *,
    mats: Anderson | None = None,
    mats_scope: str = "layer",
    **options: object,
) -> tuple[list[list[Array]], list[list[Array]]]:
    """`solves` evaluations of the map; xs[i] are task i's network inputs, adapters[i][l] the delta of module l.

    Returns (iterates, images): iterates[0] = G at Xt = X, images[k] = G(iterates[k]), iterates[k + 1] = images[k] or,
    with `mats`, the mixed step (the first pair (W, G(W)) is iterates[0], images[0]). Lengths: solves, solves - 1.
    """
    modules = range(len(net.W0))
    live = [net.inputs(x, a) for x, a in zip(xs, adapters, strict=True)]

    def image(merged: list[Array] | None) -> list[Array]:
        tilde = live if merged is None else [net.inputs(x, merged) for x in xs]
        cols = [([t[q] for t in live], [t[q] for t in tilde]) for q in modules]
        return [_merged_delta(net, q, cols[q][0], cols[q][1], list(adapters), dict(options)) for q in modules]

    iterates, images = [image(None)], []
    for _ in range(solves - 1):
        images.append(image(iterates[-1]))
        if mats is None:
            iterates.append(images[-1])
        elif mats_scope == "layer":
            iterates.append([anderson_next([w[q] for w in iterates], [g[q] for g in images], mats) for q in modules])
        else:
            flat = [[np.concatenate([m.ravel() for m in p]) for p in hist] for hist in (iterates, images)]
            ends = np.cumsum([m.size for m in images[-1]])[:-1]
            parts = np.split(anderson_next(flat[0], flat[1], mats), ends)
            iterates.append([p.reshape(m.shape) for p, m in zip(parts, images[-1], strict=True)])
    return iterates, images


def sequential(
    net: ToyNet, xs: Sequence[Array], adapters: Sequence[Sequence[Array | None]], **options: object
) -> list[Array]:
    """The fixed point in one sweep: module l is solved with Xt from the network that holds all solved modules."""
    if len(set(net.steps)) != len(net.steps):
        raise ValueError("tied weights: the input of a module depends on the module itself, no sweep is exact")
    live = [net.inputs(x, a) for x, a in zip(xs, adapters, strict=True)]
    merged: list[Array] = [np.zeros_like(W) for W in net.W0]
    for q in net.steps:
        Xt = [net.inputs(x, merged)[q] for x in xs]
        merged[q] = _merged_delta(net, q, [t[q] for t in live], Xt, list(adapters), dict(options))
    return merged


def relative_change(new: Sequence[Array], old: Sequence[Array]) -> float:
    """||W_new - W_old|| / ||W_new||, one Frobenius norm over all modules."""
    return float(
        np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(new, old, strict=True)) / sum(np.sum(a**2) for a in new))
    )
