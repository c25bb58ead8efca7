"""The published recipe of IterIS / IterIS++ as a competent PyTorch user would write it: dense, hooked, iterated.

Hooks keep the input rows of every target in each task model (X, once) and in the merged model (X~, every iteration);
each module is then solved densely, W = T1 T2^{-1}, with products in fp32 and an LU in fp64, and the result is put into
the model for the next round. lambda, a GEMM of the module's own size, is recomputed at every iteration as published.
It is a fair peer: padding is masked out, the model and the adapters are read once, weights are swapped and not copied,
and the batch-axis defects of the published code are not reproduced.

IterIS++ switches follow the document's formulas and defaults: MATS = Anderson per module, history 5, absolute 1e-6;
CAMR = diag(alpha g / sum g + beta) in T2 alone, T1 keeping alpha ||C_i||_F I; DCS = exp(-V / MAD^2), mean 1, no floor.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from loraforge.bench.peers.hooked import (
    Batch,
    Delta,
    MaskRule,
    default_mask,
    dense_delta,
    evaluating,
    input_rows,
    installed,
    targets_of,
    weight_of,
)


@dataclass(frozen=True)
class IterationLog:
    """One round: change ||W_new - W_old|| / ||W_new|| summed over modules (None at the first), residual of the map."""

    iteration: int
    relative_change: float | None
    residual: float | None
    seconds: float


@dataclass(frozen=True)
class PeerResult:
    """Merged deltas (d_out, d_in) by module, the log, wall seconds by phase, and what had to be stored.

    `lambdas` (N,) by module; `stored_bytes` counts the X and X~ rows held at once; `tokens` the rows a task by module.
    """

    deltas: dict[str, Tensor]
    log: list[IterationLog]
    seconds: dict[str, float]
    lambdas: dict[str, Tensor]
    tokens: dict[str, list[int]]
    stored_bytes: int
    converged: bool


@dataclass
class _Clock:
    """Wall seconds by phase; waits for the device so that a phase pays for its own work."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self._now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _average_median(values: Tensor) -> Tensor:
    """Median that averages the two middle values (torch.median returns the lower one)."""
    ordered = values.sort().values
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def dcs_token_weights(X: Sequence[Tensor], Ws: Sequence[Tensor], scale: float = 1.0) -> list[Tensor]:
    """w_s = exp(-V_s / sigma^2) with mean 1, V_s = (1/N) sum_i ||W_i x_s - mean||^2, sigma = MAD(V) scale, pooled."""
    variances = []
    for x in X:
        outs = torch.stack([x @ W.T for W in Ws])
        variances.append((outs - outs.mean(0)).square().sum(2).mean(0).double())
    V = torch.cat(variances)
    sigma = _average_median((V - _average_median(V)).abs()) * scale
    if sigma <= 0:  # no spread, no conflict to weigh
        return [torch.ones_like(v) for v in variances]
    w = torch.exp(-(V - V.min()) / sigma**2)  # the shift is a common factor: it avoids 0/0 when all underflow
    return list((w / w.mean()).split([len(v) for v in variances]))


class _Mats:
    """Type II Anderson mixing with one history a module: G_k - dG gamma, (dR^T dR + reg I) gamma = dR^T R_k."""

    def __init__(self, history: int, reg: float) -> None:
        self.history, self.reg = history, reg
        self.pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def step(self, name: str, old: Tensor, new: Tensor) -> Tensor:
        pairs = self.pairs.setdefault(name, [])
        pairs.append(((new - old).flatten(), new.flatten()))
        del pairs[: -self.history - 1]
        if len(pairs) == 1:
            return new
        dR = torch.stack([b[0] - a[0] for a, b in zip(pairs[:-1], pairs[1:], strict=True)], 1)
        dG = torch.stack([b[1] - a[1] for a, b in zip(pairs[:-1], pairs[1:], strict=True)], 1)
        system = dR.T @ dR + self.reg * torch.eye(dR.shape[1], dtype=dR.dtype, device=dR.device)
        return new - (dG @ torch.linalg.solve(system, dR.T @ pairs[-1][0])).view_as(new)


@dataclass(frozen=True)
class _Options:
    """Everything that one module's solve depends on besides its tensors."""

    coefficients: Sequence[float]
    alpha_1: float
    alpha_2: float
    reg_ceof: float
    use_camr: bool
    camr_alpha: float
    camr_beta: float
    use_dcs: bool
    dcs_sigma: float
    gram_dtype: torch.dtype
    lambda_mode: str


def task_lambdas(X: Sequence[Tensor], Ws: Sequence[Tensor]) -> Tensor:
    """lambda_i = ||W_i||_F^2 / ||X_i W_i^T||_F^2, (N,) float64; 0 for a task whose product is exactly 0."""
    pairs = []
    for x, W in zip(X, Ws, strict=True):
        norms = [torch.linalg.vector_norm(t, dtype=torch.float64) for t in (W, x @ W.T)]
        pairs.append((norms[0].square(), norms[1].square()))
    return torch.stack([torch.where(out == 0, torch.zeros_like(w), w / out) for w, out in pairs])


def _solve_module(
    name: str, X: list[Tensor], Xt: list[Tensor], Ws: list[Tensor], weighed: list[Tensor], opt: _Options, clock: _Clock
) -> tuple[Tensor, Tensor]:
    """(W = T1 T2^{-1} float64, lambda) of one module; Ws are the targets W_i, lambda looks at `weighed`."""
    X, Xt = [x.to(opt.gram_dtype) for x in X], [x.to(opt.gram_dtype) for x in Xt]
    with clock.phase("lambda"):
        lam = task_lambdas(X, [W.to(opt.gram_dtype) for W in weighed])
    weights: list[Tensor] | None = None
    if opt.use_dcs:
        with clock.phase("dcs"):
            weights = dcs_token_weights(X, [W.to(opt.gram_dtype) for W in Ws], opt.dcs_sigma)
    T1, T2 = torch.zeros_like(Ws[0], dtype=torch.float64), None
    for i, W in enumerate(Ws):
        with clock.phase("grams"):
            xt = (1.0 - opt.reg_ceof) * Xt[i] + opt.reg_ceof * X[i] if opt.reg_ceof else Xt[i]
            weighted = xt if weights is None else xt * weights[i].to(xt.dtype)[:, None]
            C, G = (X[i].T @ weighted).double(), (xt.T @ weighted).double()
            variance = G.diagonal().clone()
            C.diagonal().add_(opt.alpha_1 * C.norm())
            if opt.use_camr:
                G.diagonal().add_(opt.camr_alpha * variance / variance.sum() + opt.camr_beta)
            else:
                G.diagonal().add_(opt.alpha_2 * G.norm())
            scale = opt.coefficients[i] * lam[i]
            T1 += scale * (W.double() @ C)
            T2 = scale * G if T2 is None else T2 + scale * G
    advice = f"raise alpha (found alpha_1 {opt.alpha_1}, alpha_2 {opt.alpha_2}) or check the adapters for NaN"
    with clock.phase("solve"):
        try:
            W = torch.linalg.solve(T2, T1, left=False)
        except torch.linalg.LinAlgError as error:
            raise ValueError(f"T2 of {name} is singular; {advice}") from error
    if not torch.isfinite(W).all():
        raise ValueError(f"the solution of {name} is not finite; {advice}")
    return W, lam


def _summed_ratio(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> float:
    """sum_modules ||new - old|| / sum_modules ||new||, the published monitor."""
    change = sum(float((new[name] - old[name]).norm()) for name in new)
    return change / (sum(float(W.norm()) for W in new.values()) + 1e-10)


@dataclass(frozen=True)
class _Problem:
    """Model, targets and weights: frozen (`base`), N deltas, N full weights, what mode 1 adds to a delta (`shift`)."""

    model: nn.Module
    modules: dict[str, nn.Module]
    base: dict[str, Tensor]
    deltas: list[dict[str, Tensor]]
    full: list[dict[str, Tensor]]
    shift: dict[str, Tensor]
    batches: Sequence[Sequence[Batch]]
    mask_rule: MaskRule

    def rows(self, task: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Input rows of every module over task `task`'s batches, with `weights` in the model."""
        with installed(self.modules, weights):
            return input_rows(self.model, self.modules, self.batches[task], self.mask_rule)

    def solve(
        self, X: list[dict[str, Tensor]], Xt: list[dict[str, Tensor]], opt: _Options, clock: _Clock
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(W, lambda) of every module."""
        W, lam = {}, {}
        for name in self.modules:
            targets = [delta[name] + self.shift[name] for delta in self.deltas]
            rows, tilde = [x[name] for x in X], [x[name] for x in Xt]
            weighed = [w[name] for w in (self.full if opt.lambda_mode == "full" else self.deltas)]
            W[name], lam[name] = _solve_module(name, rows, tilde, targets, weighed, opt, clock)
        return W, lam


def _pose(
    model: nn.Module,
    adapters: Sequence[Mapping[str, Delta]],
    batches_by_task: Sequence[Sequence[Batch]],
    mask_rule: MaskRule,
    with_pretrain_matrix: bool,
    coefficients: Sequence[float],
) -> _Problem:
    """Checks the arguments against each other and makes the deltas dense."""
    if not len(adapters) == len(batches_by_task) == len(coefficients):
        counts = f"{len(adapters)} adapters, {len(batches_by_task)} lists of batches, {len(coefficients)} coefficients"
        raise ValueError(f"one list of batches and one coefficient an adapter expected; found {counts}")
    modules = targets_of(model, adapters)
    base = {name: weight_of(module) for name, module in modules.items()}
    zero = {name: torch.zeros_like(W) for name, W in base.items()}
    deltas = [{n: dense_delta(a[n], W) if n in a else zero[n] for n, W in base.items()} for a in adapters]
    full = [{n: W + d[n] for n, W in base.items()} for d in deltas]
    return _Problem(
        model, modules, base, deltas, full, base if with_pretrain_matrix else zero, batches_by_task, mask_rule
    )


@dataclass(frozen=True)
class _Schedule:
    """How the rounds go on and end."""

    max_iter: int
    threshold: float
    mats: _Mats | None
    on_iteration: Callable[[int, dict[str, Tensor]], None] | None


def _iterate(problem: _Problem, opt: _Options, schedule: _Schedule, clock: _Clock) -> PeerResult:
    """The loop itself: solve every module, mix, watch, put the weights in, run every task again."""
    tasks = range(len(problem.full))
    with clock.phase("collect_task"):
        X = [problem.rows(i, problem.full[i]) for i in tasks]
    Xt, old, stored, log = X, None, sum(x.nbytes for rows in X for x in rows.values()), []
    for k in range(schedule.max_iter):
        start, change, residual = time.perf_counter(), None, None
        W, lambdas = problem.solve(X, Xt, opt, clock)
        if old is not None:
            residual = _summed_ratio(W, old)
            if schedule.mats is not None:
                with clock.phase("mats"):
                    W = {name: schedule.mats.step(name, old[name], new) for name, new in W.items()}
            change = _summed_ratio(W, old)
        old = W
        result = {name: new - problem.shift[name].double() for name, new in W.items()}
        if schedule.on_iteration is not None:
            schedule.on_iteration(k, result)
        converged = change is not None and change < schedule.threshold
        if not converged and k + 1 < schedule.max_iter:
            weights = {name: base + result[name].to(base) for name, base in problem.base.items()}
            with clock.phase("collect_merged"):
                Xt = []  # the old rows go before the new ones come
                Xt = [problem.rows(i, weights) for i in tasks]
            stored = sum(x.nbytes for rows in (*X, *Xt) for x in rows.values())
        log.append(IterationLog(k, change, residual, time.perf_counter() - start))
        if converged:
            break
    tokens = {name: [len(x[name]) for x in X] for name in problem.modules}
    return PeerResult(result, log, clock.seconds, lambdas, tokens, stored, converged)


def document_loop(
    model: nn.Module,
    adapters: Sequence[Mapping[str, Delta]],
    batches_by_task: Sequence[Sequence[Batch]],
    *,
    max_iter: int = 10,
    alpha: float = 1e-7,
    alpha_1: float | None = None,
    alpha_2: float | None = None,
    reg_ceof: float = 0.0,
    with_pretrain_matrix: bool = False,
    coefficients: Sequence[float] | None = None,
    lambda_mode: str = "full",
    use_mats: bool = False,
    mats_history_size: int = 5,
    mats_regularization: float = 1e-6,
    use_camr: bool = False,
    camr_alpha: float | None = None,
    camr_beta: float = 1e-8,
    use_dcs: bool = False,
    dcs_sigma: float = 1.0,
    convergence_threshold: float = 1e-6,
    gram_dtype: torch.dtype = torch.float32,
    mask_rule: MaskRule = default_mask,
    on_iteration: Callable[[int, dict[str, Tensor]], None] | None = None,
) -> PeerResult:
    """Merges `adapters` into one dense delta a module by the document's loop.

    Args:
        model: Base model that holds the frozen weights; unchanged when the call returns.
        adapters: One mapping a task, dotted module name -> delta (see `Delta`); an absent module counts as delta 0.
        batches_by_task: Keyword arguments of the model's forward, one list of batches a task.
        max_iter: Solves; the merged model runs max_iter - 1 times over all samples.
        alpha: Value of alpha_1 and alpha_2 unless these are given.
        alpha_1: Share of ||C_i||_F on the diagonal of the cross-Gram.
        alpha_2: Share of ||G_i||_F on the diagonal of the Gram.
        reg_ceof: Share rho of the task model's rows in X~ (the document's spelling).
        with_pretrain_matrix: Match the outputs of the full weights, not of the deltas.
        coefficients: c_i, one a task; default 1 each.
        lambda_mode: "full" weighs a task by its full weight, "delta" by its delta.
        use_mats: Mix iterates by Anderson's method.
        mats_history_size: Differences kept a module.
        mats_regularization: Added to the diagonal of its least-squares problem.
        use_camr: Regularise the Gram by the variances of its features.
        camr_alpha: Factor of the variances' shares; alpha_1 unless given.
        camr_beta: Constant on the diagonal.
        use_dcs: Weigh tokens by how far the tasks' outputs differ on them.
        dcs_sigma: Factor of the MAD.
        convergence_threshold: Stops below it, 0 never does.
        gram_dtype: Of the products; the published code uses fp32.
        mask_rule: Mask (B, L) of the tokens that count for a module's input, or None for all of them.
        on_iteration: Called with (iteration, dense deltas after it).

    Returns:
        PeerResult; the deltas are float64 on the model's device.

    Raises:
        ValueError: A module is unknown, of another type or never called, counts differ, a solve is not finite.
    """
    if max_iter < 1 or lambda_mode not in ("full", "delta"):
        raise ValueError(f"max_iter >= 1 and lambda_mode full|delta expected; found {max_iter}, {lambda_mode!r}")
    counts = [1.0] * len(adapters) if coefficients is None else list(coefficients)
    problem = _pose(model, adapters, batches_by_task, mask_rule, with_pretrain_matrix, counts)
    a1, a2 = alpha if alpha_1 is None else alpha_1, alpha if alpha_2 is None else alpha_2
    c_alpha = a1 if camr_alpha is None else camr_alpha
    opt = _Options(counts, a1, a2, reg_ceof, use_camr, c_alpha, camr_beta, use_dcs, dcs_sigma, gram_dtype, lambda_mode)
    mats = _Mats(mats_history_size, mats_regularization) if use_mats else None
    with evaluating(model):
        return _iterate(
            problem,
            opt,
            _Schedule(max_iter, convergence_threshold, mats, on_iteration),
            _Clock(next(model.parameters()).device),
        )
