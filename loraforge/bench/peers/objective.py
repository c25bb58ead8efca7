"""The IterIS objective of any merged deltas, whoever computed them: the third piece of code that judges the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

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


def objective_terms(
    model: nn.Module,
    adapters: Sequence[Mapping[str, Delta]],
    batches_by_task: Sequence[Sequence[Batch]],
    deltas: Mapping[str, Delta],
    *,
    coefficients: Sequence[float] | None = None,
    lambda_mode: str = "full",
    mask_rule: MaskRule = default_mask,
) -> dict[str, tuple[float, float]]:
    """Per module (sum_i a_i ||X_i W_i^T - X~_i W^T||_F^2, sum_i a_i ||X_i W_i^T||_F^2), a_i = c_i lambda_i.

    W_i are the adapters' deltas and W the merged one (0 where `deltas` lacks the module); X~_i comes from the model
    that carries `deltas`. Sums in float64, one batch in memory at a time. `lambda_mode`: full | delta | one.
    """
    modules = targets_of(model, [*adapters, deltas])
    counts = [1.0] * len(adapters) if coefficients is None else list(coefficients)
    base = {name: weight_of(module) for name, module in modules.items()}
    merged = {name: dense_delta(delta, base[name]) for name, delta in deltas.items()}
    merged_full = {name: base[name] + delta for name, delta in merged.items()}
    sums = {name: (0.0, 0.0) for name in modules}
    with evaluating(model):
        for i, adapter in enumerate(adapters):
            own = {name: dense_delta(delta, base[name]) for name, delta in adapter.items()}
            own_full = {name: base[name] + delta for name, delta in own.items()}
            raw = {name: [0.0, 0.0, 0.0] for name in modules}
            for batch in batches_by_task[i]:
                with installed(modules, own_full):
                    X = input_rows(model, modules, [batch], mask_rule)
                with installed(modules, merged_full):
                    Xt = input_rows(model, modules, [batch], mask_rule)
                for name, (x, xt) in ((name, (X[name], Xt[name])) for name in modules):
                    y = x @ own[name].T if name in own else x.new_zeros(len(x), len(base[name]))
                    z = xt @ merged[name].T if name in merged else torch.zeros_like(y)
                    # lambda full looks at the whole output of the task model's module, delta at the adapter's part
                    seen = x @ own_full.get(name, base[name]).T if lambda_mode == "full" else y
                    for j, value in enumerate((y - z, y, seen)):
                        raw[name][j] += float(value.double().square().sum())
            for name, (error, size, seen_size) in raw.items():
                W = own_full.get(name, base[name]) if lambda_mode == "full" else own.get(name)
                norm = 0.0 if W is None else float(W.double().square().sum())
                lam = 1.0 if lambda_mode == "one" else norm / seen_size if seen_size > 0 else 0.0
                a, kept = counts[i] * lam, sums[name]
                sums[name] = (kept[0] + a * error, kept[1] + a * size)
    return sums


def iteris_objective(
    model: nn.Module,
    adapters: Sequence[Mapping[str, Delta]],
    batches_by_task: Sequence[Sequence[Batch]],
    deltas: Mapping[str, Delta],
    **options: Any,
) -> float:
    """The IterIS objective of merged `deltas`, summed over modules and tasks and **normalised**: 0 exact, 1 for W = 0.

    total / size with total = sum_modules sum_i c_i lambda_i ||X_i W_i^T - X~_i W^T||^2 and
    size = sum_modules sum_i c_i lambda_i ||X_i W_i^T||^2. Options as in `objective_terms`. It may exceed 1.
    """
    terms = objective_terms(model, adapters, batches_by_task, deltas, **options).values()
    size = sum(own for _, own in terms)
    if size <= 0:
        raise ValueError("every adapter is zero on these batches: the objective has nothing to be compared with")
    return sum(error for error, _ in terms) / size
