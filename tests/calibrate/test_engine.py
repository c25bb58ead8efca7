"""The sweep against the iteration, and what must not change a result."""

from __future__ import annotations

import math

import pytest
import torch

from loraforge.calibrate.batches import make_batches
from loraforge.calibrate.data import load_calibration
from loraforge.calibrate.engine import Engine, Monitor
from loraforge.calibrate.trace import trace_model
from loraforge.calibrate.weights import Collecting
from loraforge.linalg.anderson import AndersonMixer
from loraforge.merging.iteris import solve_layer
from loraforge.merging.iteris_params import IterisParams
from loraforge.types import LowRank
from tests.calibrate import models

FIXED = {
    "use_camr": False,
    "use_dcs": False,
    "alpha_1": 1e-4,
    "alpha_2": 1e-4,
    "reg_ceof": 0.0,
    "lambda_weight": "full",
}


def sets_of(family, tasks=2, samples=6, length=9, seed=5, change=lambda inputs: inputs):
    g = torch.Generator().manual_seed(seed)
    found = []
    for task in range(tasks):
        inputs = change(models.inputs_of(family, g, samples, length))
        found.append(load_calibration(inputs, name=f"task{task}"))
    return found


def engine_of(
    case, sets, factors, *, params=None, batch_tokens=64, folds=None, mixer=None, max_iter=40, threshold=1e-13
):
    params = params or IterisParams(**FIXED)
    folds = folds or [[0] * len(s) for s in sets]
    batches = make_batches(sets, folds, batch_tokens=batch_tokens)
    options = {"use_cache": False} if hasattr(case.model.config, "use_cache") else {}
    modules = case.modules()
    searches = params.searches and params.reg_ceof == "auto"
    how = Collecting(
        coefficients=[1.0] * len(sets),
        folds=1 + max(max(f) for f in folds),
        lambda_weight=params.lambda_weight,
        rho=None if searches else float(params.reg_ceof),
        full_weight=params.with_pretrain_matrix == 1,
        target_merged=params.target == "merged",
        exact_cross_norm=params.alpha_1 != "auto",
        offdiag=1.0,
        weighting=None,
    )
    return Engine(
        model=case.model,
        modules=modules,
        factors=factors,
        batches=batches,
        options=options,
        trace=trace_model(case.model, modules, [b.inputs for b in batches], options),
        how=how,
        solve=lambda stats, choices: solve_layer(stats, params, choices),
        cut=lambda name, basis, state, factor, left, rank: LowRank(
            basis if basis is not None else torch.eye(state.shape[0], dtype=torch.float64), state
        ),
        monitor=Monitor(max_iter, threshold, mixer, False),
    )


def deltas(engine):
    return {name: pair.delta() for name, pair in engine.merged.items()}


def distance(a, b):
    away = sum(float((a[n] - b[n]).square().sum()) for n in a)
    return math.sqrt(away / sum(float(v.square().sum()) for v in b.values()))


def swept(family, **options):
    case = models.make(family)
    sets = options.pop("sets", None) or sets_of(family)
    factors = options.pop("factors", None) or case.factors(len(sets))
    engine = engine_of(case, sets, factors, **options)
    engine.sweep()
    return engine


@pytest.mark.parametrize("family", sorted(models.FAMILIES | models.UNUSUAL))
def test_sweep_is_the_limit_of_the_iteration(family):
    sweep = swept(family)
    assert sweep.verify() == 0.0
    case = models.make(family)
    sets = sets_of(family)
    jacobi = engine_of(case, sets, case.factors(2))
    assert jacobi.iterate()
    errors = [it["relative_change"] for it in jacobi.iterations]
    assert len(errors) > 2, "the modules must depend on each other, or the test shows nothing"
    assert errors[1] > 1e-6
    assert distance(deltas(jacobi), deltas(sweep)) < 1e-8


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_full_weight_sweep_is_the_limit_too(family):
    params = IterisParams(**(FIXED | {"with_pretrain_matrix": 1}))
    sweep = swept(family, params=params)
    assert sweep.verify() == 0.0
    case = models.make(family)
    jacobi = engine_of(case, sets_of(family), case.factors(2), params=params)
    assert jacobi.iterate()
    assert distance(deltas(jacobi), deltas(sweep)) < 1e-7


def test_anderson_mixing_has_the_same_limit():
    plain = swept("bert")
    case = models.make("bert")
    mixed = engine_of(case, sets_of("bert"), case.factors(2), mixer=lambda: AndersonMixer(), threshold=1e-11)
    assert mixed.iterate()
    assert distance(deltas(mixed), deltas(plain)) < 1e-8


@pytest.mark.parametrize("family", ["bert", "t5", "blip", "deberta", "xlnet"])
def test_batching_and_padding_change_nothing(family):
    """One batch for all, one sample a batch, and padding columns more: the same sums."""
    sets = sets_of(family)
    small = deltas(swept(family, sets=sets, batch_tokens=1))
    large = deltas(swept(family, sets=sets, batch_tokens=10_000))
    assert distance(small, large) < 1e-9
    words = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")

    def pad(inputs):
        return {k: torch.nn.functional.pad(v, (0, 3)) if k in words else v for k, v in inputs.items()}

    assert distance(deltas(swept(family, sets=sets_of(family, change=pad))), large) < 1e-9


def test_padding_counts_nowhere_when_the_first_task_has_single_tokens():
    """The masks are read off the longest samples, whichever task they belong to."""
    short = sets_of("bert", tasks=1, change=lambda inputs: {k: v[:, :1] for k, v in inputs.items()})
    long = sets_of("bert", tasks=2)[1:]
    case = models.make("bert")
    factors = case.factors(2)
    a = swept("bert", sets=short + long, factors=factors)
    b = swept("bert", sets=long + short, factors={n: p[::-1] for n, p in factors.items()})
    assert distance(deltas(b), deltas(a)) < 1e-9
    want = sum(int(s["attention_mask"].sum()) for s in long[0].samples)
    assert {row["tokens"][1] for row in a.layers.values()} == {want}


def test_task_order_changes_nothing():
    sets = sets_of("llama", tasks=3)
    case = models.make("llama")
    factors = case.factors(3)
    a = deltas(swept("llama", sets=sets, factors=factors))
    back = {name: pairs[::-1] for name, pairs in factors.items()}
    b = deltas(swept("llama", sets=sets[::-1], factors=back))
    assert distance(b, a) < 1e-9


def test_sample_order_changes_nothing():
    sets = sets_of("bert")
    turned = sets_of("bert", change=lambda inputs: {k: v.flip(0) for k, v in inputs.items()})
    assert distance(deltas(swept("bert", sets=turned)), deltas(swept("bert", sets=sets))) < 1e-9


def test_one_adapter_is_returned_and_identical_ones_too():
    case = models.make("bert")
    one = case.factors(1)
    single = deltas(swept("bert", sets=sets_of("bert", tasks=1), factors=one))
    want = {name: pairs[0].delta() for name, pairs in one.items()}
    assert distance(single, want) < 1e-9
    twice = {name: [pairs[0]] * 2 for name, pairs in one.items()}
    assert distance(deltas(swept("bert", factors=twice)), want) < 1e-9


def test_module_that_one_adapter_lacks():
    case = models.make("bert")
    factors = case.factors(2)
    name = next(iter(factors))
    zero = {n: list(p) for n, p in factors.items()}
    pair = factors[name][1]
    zero[name][1] = LowRank(torch.zeros_like(pair.B), pair.A)
    gone = {n: list(p) for n, p in factors.items()}
    gone[name][1] = None
    assert distance(deltas(swept("bert", factors=gone)), deltas(swept("bert", factors=zero))) < 1e-9


def test_hooks_and_threads_are_gone_after_an_error():
    import threading

    case = models.make("bert")
    engine = engine_of(case, sets_of("bert"), case.factors(2))

    def broken(stats, choices):
        raise ValueError("broken solver")

    engine.solve = broken
    before = threading.active_count()
    with pytest.raises(ValueError, match="broken solver"):
        engine.sweep()
    assert threading.active_count() == before
    assert not any(m._forward_hooks for m in case.model.modules())


def test_masks_follow_the_right_axis():
    case = models.make("t5")
    sets = sets_of("t5")
    engine = engine_of(case, sets, case.factors(2))
    axis = engine.trace.axis
    assert axis["encoder.block.0.layer.0.SelfAttention.q"] == "encoder"
    assert axis["decoder.block.0.layer.0.SelfAttention.q"] == "decoder"
    assert axis["decoder.block.0.layer.1.EncDecAttention.q"] == "decoder"
    assert axis["decoder.block.0.layer.1.EncDecAttention.v"] == "encoder"
    blip = models.make("blip")
    trace = engine_of(blip, sets_of("blip"), blip.factors(2)).trace
    cross = [n for n in trace.order if "crossattention" in n]
    assert {trace.axis[n] for n in cross if n.endswith("query")} == {"encoder"}
    assert {trace.axis[n] for n in cross if n.endswith("key")} == {"all"}


def test_modules_with_the_same_input_share_a_leader():
    case = models.make("llama")
    leaders = engine_of(case, sets_of("llama"), case.factors(2)).trace.leaders
    prefix = "model.layers.0.self_attn."
    assert {leaders[prefix + p] for p in ("q_proj", "k_proj", "v_proj")} == {prefix + "q_proj"}
    assert leaders[prefix + "o_proj"] == prefix + "o_proj"
