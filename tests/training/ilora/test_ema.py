"""The average over adapter tensors against its closed form, in every precision the adapters come in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from loraforge.training.ilora.config import ILoraConfig
from loraforge.training.ilora.ema import EmaPairs, Pair, effective_weight, update_ema
from tests.oracles import ilora as oracle

SHAPES = [(3, 5), (7,), (1, 1), (16, 33), (2, 3, 4)]


def pairs_of(dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [
        Pair(
            f"p{at}",
            nn.Parameter(torch.randn(shape, generator=draw).to(dtype)),
            nn.Parameter(torch.randn(shape, generator=draw).to(dtype), requires_grad=False),
        )
        for at, shape in enumerate(SHAPES)
    ]


@pytest.mark.parametrize(
    ("alpha", "convention", "values"),
    [
        (0.25, "weight_of_new", [0.25, 0.4375, 0.578125, 0.683594, 0.762695]),
        (0.25, "decay", [0.75, 0.9375, 0.984375, 0.996094, 0.999023]),
    ],
)
def test_the_published_numbers_of_both_conventions(alpha, convention, values):
    pair = Pair("p", nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1), requires_grad=False))
    ema = EmaPairs([pair])
    config = ILoraConfig(ema_alpha=alpha, ema_convention=convention)
    for step, wanted in enumerate(values, 1):
        update_ema(ema, effective_weight(config, step))
        assert float(pair.stable) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize(("alpha", "convention"), [(0.25, "weight_of_new"), (0.999, "decay"), (0.02, "weight_of_new")])
def test_the_weight_of_a_step(alpha, convention, warmup):
    config = ILoraConfig(ema_alpha=alpha, ema_convention=convention, ema_warmup=warmup)
    for step in (1, 2, 3, 50, 998, 999, 5000):
        wanted = oracle.new_weight(alpha, step, convention, warmup)
        assert effective_weight(config, step) == pytest.approx(wanted, abs=1e-15)
    assert effective_weight(config, 1) == (0.5 if warmup else pytest.approx(config.new_weight))


def test_many_tensors_follow_a_moving_target():
    pairs = pairs_of()
    start = [pair.stable.detach().numpy().astype(np.float64) for pair in pairs]
    ema, targets = EmaPairs(pairs), []
    for step in range(12):
        with torch.no_grad():
            for pair in pairs:
                pair.plastic.add_(torch.randn(pair.plastic.shape, generator=torch.Generator().manual_seed(step)))
        targets.append([pair.plastic.detach().numpy().astype(np.float64) for pair in pairs])
        ema.update(0.3)
    for at, pair in enumerate(pairs):
        closed = oracle.ema_closed_form(start[at], [values[at] for values in targets], 0.3)
        # 12 roundings of float32 values of order 1.
        np.testing.assert_allclose(pair.stable.detach().numpy(), closed, atol=2e-6)
    gaps = [target - pair.stable.detach().numpy() for target, pair in zip(targets[-1], pairs, strict=True)]
    distance = sum((gap**2).sum() for gap in gaps)
    assert ema.drift() == pytest.approx(distance**0.5, rel=1e-5)


def test_laying_out_moves_memory_and_nothing_else():
    pairs = pairs_of()
    before = [(pair.plastic.detach().clone(), pair.stable.detach().clone()) for pair in pairs]
    parameters = [(id(pair.plastic), id(pair.stable)) for pair in pairs]
    EmaPairs(pairs)
    assert parameters == [(id(pair.plastic), id(pair.stable)) for pair in pairs]
    for pair, (plastic, stable) in zip(pairs, before, strict=True):
        assert torch.equal(pair.plastic, plastic) and torch.equal(pair.stable, stable)
        assert pair.plastic.is_contiguous() and pair.plastic.requires_grad and not pair.stable.requires_grad
    assert len({pair.stable.untyped_storage().data_ptr() for pair in pairs}) == 1


def test_an_optimiser_and_a_gradient_work_on_the_laid_out_parameters():
    plain, laid = pairs_of(), pairs_of()
    EmaPairs(laid)
    for pairs in (plain, laid):
        optimiser = torch.optim.AdamW([pair.plastic for pair in pairs], lr=0.1)
        for _ in range(3):
            sum((pair.plastic**2).sum() for pair in pairs).backward()
            optimiser.step()
            optimiser.zero_grad()
    for one, other in zip(plain, laid, strict=True):
        assert torch.equal(one.plastic, other.plastic) and torch.equal(one.stable, other.stable)


def test_small_weights_do_not_stall_under_bfloat16():
    pairs = [Pair("p", nn.Parameter(torch.full((4,), 1.01).bfloat16()), nn.Parameter(torch.ones(4).bfloat16(), False))]
    target = float(pairs[0].plastic[0].detach())
    ema = EmaPairs(pairs)
    for _ in range(2000):
        ema.update(0.001)
    wanted = target + (1.0 - target) * 0.999**2000
    with ema.full_precision():
        assert pairs[0].stable.dtype == torch.float32
        assert pairs[0].stable.tolist() == pytest.approx([wanted] * 4, abs=1e-5)
    # In bfloat16 itself, 1 + 0.001 * 0.0078 is 1.
    assert float(torch.ones(1).bfloat16().lerp(pairs[0].plastic[:1].detach(), 0.001)) == 1.0
    assert pairs[0].stable.dtype == torch.bfloat16
    assert float(pairs[0].stable[0].detach()) == pytest.approx(wanted, abs=2**-8)


def test_what_is_written_in_full_precision_becomes_the_average():
    pairs = pairs_of(torch.bfloat16)
    ema = EmaPairs(pairs)
    with ema.full_precision(), torch.no_grad():
        for pair in pairs:
            pair.stable.fill_(1.0009765625)
    for pair in pairs:
        assert pair.stable.dtype == torch.bfloat16 and bool((pair.stable == 1.0).all())
    with ema.full_precision():
        assert all(bool((pair.stable == 1.0009765625).all()) for pair in pairs)


def test_an_average_in_float64():
    pairs = pairs_of()
    ema = EmaPairs(pairs, torch.float64)
    ema.update(0.5)
    with ema.full_precision():
        assert {pair.stable.dtype for pair in pairs} == {torch.float64}
    assert {pair.stable.dtype for pair in pairs} == {torch.float32}


def test_a_model_that_was_moved_since_is_laid_out_anew():
    pairs = pairs_of()
    ema = EmaPairs(pairs)
    for pair in pairs:
        pair.plastic.data = pair.plastic.data.clone() + 1
        pair.stable.data = pair.stable.data.clone()
    wanted = [(pair.stable + 0.25 * (pair.plastic - pair.stable)).detach() for pair in pairs]
    ema.update(0.25)
    for pair, value in zip(pairs, wanted, strict=True):
        torch.testing.assert_close(pair.stable.detach(), value, rtol=0, atol=1e-6)
