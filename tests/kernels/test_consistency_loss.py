from __future__ import annotations

import numpy as np
import pytest
import torch

from loraforge.errors import LoraforgeError, UsageError
from loraforge.kernels import consistency_loss

F64 = torch.float64


def _oracle(plastic, stable, masks, keeps, normalise):
    """sum_l sum m D_l / (sum_l H_l sum m), D_l over the mean of S_l^2 where asked; `keeps` says which entries stay."""
    total = entries = 0.0
    for P, S, m, keep in zip(plastic, stable, masks, keeps, strict=True):
        p, s, m = P.numpy(), S.numpy(), m.double().numpy()[..., None]
        D = np.where(keep, 0.0, (p - s) ** 2)
        if normalise:
            D = D / ((m * s**2).sum() / (p.shape[-1] * m.sum()))
        total, entries = total + (m * D).sum(), entries + p.shape[-1] * m.sum()
    return total / entries


def _layers(rng, widths, *tokens):
    return [[torch.randn(*tokens, H, generator=rng, dtype=F64) for H in widths] for _ in range(2)]


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("widths", [(5, 5, 5), (3, 8)])
@pytest.mark.parametrize("rule", ["elementwise", "none", "margin", "deadband", "token"])
def test_the_loss_over_layers(path, rng, rule, widths, normalise):
    plastic, stable = _layers(rng, widths, 2, 7)
    mask, keep = torch.rand(2, 7, generator=rng) > 0.3, torch.rand(2, 7, generator=rng) > 0.5
    keeps = [
        {
            "elementwise": P > S,
            "none": torch.zeros_like(P) > 0,
            "margin": P - S > 0.2,
            "deadband": S - P <= 0.2,
            "token": keep[..., None].expand_as(P),
        }[rule].numpy()
        for P, S in zip(plastic, stable, strict=True)
    ]
    given = keep if rule == "token" else None
    for m in (mask, mask.long(), mask.double()):
        got = consistency_loss(plastic, stable, m, rule, 0.2, layer_normalise=normalise, keep=given)
        assert got.item() == pytest.approx(_oracle(plastic, stable, [mask] * len(widths), keeps, normalise), rel=1e-12)
    unmasked = consistency_loss(plastic, stable, None, rule, 0.2, layer_normalise=normalise, keep=given)
    ones = torch.ones(2, 7)
    assert unmasked.item() == pytest.approx(_oracle(plastic, stable, [ones] * len(widths), keeps, normalise), rel=1e-12)


def test_without_a_mask_it_is_the_mean_of_the_concatenated_errors(path, rng):
    plastic, stable = _layers(rng, (5, 5), 2, 7)
    D = [(P - torch.where(P > S, P, S)).square() for P, S in zip(plastic, stable, strict=True)]
    assert consistency_loss(plastic, stable).item() == pytest.approx(torch.cat(D).mean().item(), rel=1e-13)


def test_layers_with_masks_of_their_own(path, rng):
    ((P1,), (S1,)), ((P2,), (S2,)) = _layers(rng, (4,), 7), _layers(rng, (6,), 3)
    masks = [torch.arange(7) > 1, torch.arange(3) > 0]
    keeps = [(P > S).numpy() for P, S in ((P1, S1), (P2, S2))]
    got = consistency_loss([P1, P2], [S1, S2], masks)
    assert got.item() == pytest.approx(_oracle([P1, P2], [S1, S2], masks, keeps, False), rel=1e-12)


@pytest.mark.parametrize("rule", ["margin", "deadband"])
def test_a_threshold_in_units_of_the_stable_states(path, rng, rule):
    plastic, stable = _layers(rng, (5, 8), 9)
    mask = torch.arange(9) > 3
    stable[0][0] = float("nan")  # does not count
    got = consistency_loss(plastic, stable, mask, rule, 0.5, threshold_unit="rms")
    keeps = []
    for P, S in zip(plastic, stable, strict=True):
        limit = 0.5 * S[mask].square().mean().sqrt()
        keeps.append(((P - S > limit) if rule == "margin" else (S - P <= limit))[mask].numpy())
    counted = [[t[mask] for t in side] for side in (plastic, stable)]
    assert got.item() == pytest.approx(_oracle(*counted, [mask[mask]] * 2, keeps, False), rel=1e-12)
    scaled = consistency_loss(
        [3 * P for P in plastic], [3 * S for S in stable], mask, rule, 0.5, layer_normalise=True, threshold_unit="rms"
    )
    same = consistency_loss(plastic, stable, mask, rule, 0.5, layer_normalise=True, threshold_unit="rms")
    assert scaled.item() == pytest.approx(same.item(), rel=1e-12)  # free of units


@pytest.mark.parametrize("normalise", [False, True])
def test_the_gradient_is_that_of_the_formula(path, rng, normalise):
    plastic, stable = _layers(rng, (3, 6), 7)
    mask = torch.arange(7) != 4
    ours, theirs = ([P.clone().requires_grad_() for P in plastic] for _ in range(2))
    consistency_loss(ours, stable, mask, layer_normalise=normalise).backward()
    total = 0.0
    for P, S in zip(theirs, stable, strict=True):
        D = (P - torch.where(P > S, P.detach(), S)).square()[mask].sum()
        total = total + (D / S[mask].square().mean() if normalise else D)
    (total / (9 * 6)).backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-15)


def test_equal_states_cost_nothing(path, rng):
    plastic, _ = _layers(rng, (5,), 7)
    assert consistency_loss(plastic, plastic, rule="none", layer_normalise=True).item() == 0.0
    zeros = [torch.zeros(7, 5)]
    assert consistency_loss(zeros, zeros, rule="margin", layer_normalise=True, threshold_unit="rms").item() == 0.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"plastic": [], "stable": []}, ["no layers"]),
        ({"stable": []}, ["stable has another number of layers", "found: 0", "expected: 1"]),
        ({"mask": [torch.ones(3)] * 2}, ["mask has another number of layers"]),
        ({"rule": "token"}, ["keep goes with the rule token", "found: None"]),
        ({"keep": torch.ones(3, dtype=torch.bool)}, ["keep goes with the rule token", "elementwise"]),
        ({"rule": "token", "keep": torch.ones(3)}, ["a bool tensor", "float32"]),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    layers = {"plastic": [torch.zeros(3, 5)], "stable": [torch.zeros(3, 5)]}
    with pytest.raises(LoraforgeError) as caught:
        consistency_loss(**(layers | change))
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(("name", "value", "close"), [("rule", "tokn", "token"), ("threshold_unit", "rmse", "rms")])
def test_unknown_words_are_refused(name, value, close):
    with pytest.raises(UsageError, match=f"did you mean '{close}'"):
        consistency_loss([torch.zeros(3, 5)], [torch.zeros(3, 5)], **{name: value})
