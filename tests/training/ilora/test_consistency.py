"""Hidden states of wanted layers, what counts, what is kept: against the oracle and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loraforge.errors import LoraforgeError
from loraforge.training.ilora.batches import has_targets, joined, rows_of, wasted
from loraforge.training.ilora.consistency import LabelMask, kept_fraction, kept_tokens, pull, target_losses, token_mask
from loraforge.training.ilora.hidden import HiddenStates, accepted, probe, resolve_layers
from tests.oracles import ilora as oracle
from tests.training.ilora import models
from tests.training.ilora.models import bart, bert, collate, config, image_rows, llama, pair_rows, t5, text_rows, vit

P = torch.tensor([[[[1.0, -2.0], [3.0, 0.0]]], [[[0.0, 0.0], [1.0, 1.0]]]])
S = torch.tensor([[[[0.0, 1.0], [3.5, -1.0]]], [[[2.0, 0.0], [0.0, 3.0]]]])


@pytest.mark.parametrize(
    ("values", "mask", "wanted"),
    [
        ({}, None, 2.15625),
        ({}, [[1, 0]], 3.25),
        ({"selective_rule": "none"}, None, 2.53125),
        ({"selective_update": False}, [[1, 0]], 3.5),
        ({"selective_rule": "margin", "min_update_threshold": 1.0}, None, 2.53125),
        ({"selective_rule": "deadband", "min_update_threshold": 1.0}, None, 2.125),
        ({"min_update_threshold": 5.0}, None, 2.15625),
    ],
)
def test_the_hand_sized_example(values, mask, wanted):
    mask = None if mask is None else torch.tensor(mask).bool()
    assert float(pull(config(**values), list(P), list(S), mask, None)) == pytest.approx(wanted, abs=1e-12)
    rule = config(**values).rule
    theirs, _ = oracle.consistency_loss(
        [x.numpy() for x in P], [x.numpy() for x in S], None if mask is None else mask.numpy(), rule,
        values.get("min_update_threshold", 0.1),
    )  # fmt: skip
    assert theirs == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("rule", ["elementwise", "margin", "deadband", "none", "token"])
@pytest.mark.parametrize("masked", [False, True])
def test_loss_gradient_and_kept_share(rule, masked):
    draw = np.random.default_rng(3)
    plastic = [torch.tensor(draw.normal(size=(2, 5, width)), dtype=torch.float32) for width in (4, 4, 6)]
    stable = [x + torch.tensor(draw.normal(size=x.shape) * 0.2, dtype=torch.float32) for x in plastic]
    mask = torch.tensor(draw.random((2, 5)) < 0.6) if masked else None
    keep = torch.tensor(draw.random((2, 5)) < 0.5) if rule == "token" else None
    for x in plastic:
        x.requires_grad_(True)
    settings = config(selective_rule=rule)
    value = pull(settings, plastic, stable, mask, keep)
    value.backward()
    arrays = [[x.detach().numpy() for x in side] for side in (plastic, stable)]
    flags = [None if x is None else x.numpy() for x in (mask, keep)]
    wanted, gradients = oracle.consistency_loss(*arrays, flags[0], rule, 0.1, flags[1])
    assert float(value.detach()) == pytest.approx(wanted, rel=1e-6)
    for x, gradient in zip(plastic, gradients, strict=True):
        np.testing.assert_allclose(x.grad.numpy(), gradient, rtol=1e-5, atol=1e-8)
    counted = np.ones((2, 5)) if mask is None else mask.numpy()
    gaps = [p.astype(np.float64) - s for p, s in zip(*arrays, strict=True)]
    chosen = {
        "elementwise": lambda d: d > 0,
        "margin": lambda d: d > 0.1,
        "deadband": lambda d: -d <= 0.1,
        "none": lambda d: np.zeros(d.shape),
        "token": lambda d: np.broadcast_to(flags[1][..., None] if keep is not None else 0, d.shape),
    }[rule]
    share = sum((chosen(d) * counted[..., None]).sum() for d in gaps) / (counted.sum() * 14)
    assert float(kept_fraction(settings, [x.detach() for x in plastic], stable, mask, keep)) == pytest.approx(share)


@pytest.mark.parametrize(
    ("build", "rows"),
    [(llama, text_rows), (t5, pair_rows), (bart, pair_rows), (bert, models.class_rows), (vit, image_rows)],
)
def test_the_wanted_layers_are_those_of_the_full_tuple(build, rows):
    model = build().eval()
    batch = {key: value for key, value in collate(rows(2)).items() if key != "task"}
    labels = batch.pop("labels")
    if build in (t5, bart):
        batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
    model.train()
    states = probe(model, batch, [-1, -3, 0])
    assert model.training and states.layers == (3, 1, 0)
    model.eval()
    full = model(**batch, output_hidden_states=True)
    full = full.get("decoder_hidden_states") or full.hidden_states
    assert len(full) == 4
    some = model(**batch, output_hidden_states=states.request)
    for got, layer in zip(states.of(some), (-1, -3, 0), strict=True):
        assert torch.equal(got, full[layer])
    if states.request is not True:
        kept = some.get("decoder_hidden_states") or some.hidden_states
        assert [state is None for state in kept] == [False, False, True, False]


def test_layers_are_counted_as_transformers_counts_them():
    assert resolve_layers("all", 4) == (1, 2, 3)
    assert resolve_layers((-1, 0, -2), 4) == (3, 0, 2)
    with pytest.raises(LoraforgeError, match="does not have") as error:
        resolve_layers((-1, 4, -5), 4)
    assert error.value.got == "4, -5" and error.value.expected.startswith("-4 to 3")
    with pytest.raises(LoraforgeError, match="twice"):
        resolve_layers((-1, 3), 4)


def test_a_model_that_ignores_the_list_gives_all_and_the_wanted_are_taken():
    model = llama().eval()
    batch = {key: value for key, value in collate(text_rows(1)).items() if key in ("input_ids", "attention_mask")}
    states = HiddenStates((3, 1), True)
    full = model(**batch, output_hidden_states=True)
    for got, layer in zip(states.of(full), (3, 1), strict=True):
        assert torch.equal(got, full.hidden_states[layer])
    assert accepted(model, logits_to_keep=1, nonsense=2) == {"logits_to_keep": 1}


def test_tokens_that_count():
    batch = collate(text_rows(3))
    shape = batch["input_ids"].shape
    assert torch.equal(token_mask(config(), "causal", batch, shape), batch["attention_mask"].bool())
    answers = token_mask(config(consistency_mask="labels"), "causal", batch, shape)
    assert torch.equal(answers, batch["labels"] != -100) and int(answers[:, :2].sum()) == 0
    pairs = collate(pair_rows(3))
    assert torch.equal(token_mask(config(), "text-to-text", pairs, pairs["labels"].shape), pairs["labels"] != -100)
    assert token_mask(config(), "images", collate(image_rows(2)), (2, 5)) is None


def test_a_token_is_kept_where_its_label_is_likelier_under_the_plastic_adapter():
    labels = torch.tensor([[-100, -100, 1, 0, -100]])
    plastic, stable = torch.zeros(1, 5, 2), torch.zeros(1, 5, 2)
    plastic[0, 1, 1] = 1.0  # position 1 answers for label 1 at position 2: better
    plastic[0, 2, 1] = 1.0  # position 2 answers for label 0 at position 3: worse
    plastic[0, 4] = 5.0  # position 4 answers for nothing
    kept = kept_tokens(plastic, stable, labels, (1, 5), shifted=True)
    assert kept.tolist() == [[False, True, False, False, False]]
    losses = target_losses(plastic, labels, shifted=True)
    assert losses[0, 0] == 0 and losses[0, 3] == 0 and float(losses[0, 2]) == pytest.approx(np.log(1 + np.e))
    direct = kept_tokens(plastic[:, :3], stable[:, :3], torch.tensor([[0, 1, 1]]), (1, 3), shifted=False)
    assert direct.tolist() == [[False, True, True]]
    rows = kept_tokens(
        torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.zeros(2, 2), torch.tensor([0, 1]), (2, 3), shifted=False
    )
    assert rows.tolist() == [[True] * 3, [False] * 3]


def test_labels_of_other_tasks_are_out_of_reach():
    mask = LabelMask({0: (0, 1), 2: (2, 3)}, 4)
    assert mask.acts and not LabelMask({0: (0, 1), 1: (1, 0)}, 2).acts
    logits = torch.zeros(2, 4, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(mask(logits, torch.tensor([0, 2])), torch.tensor([1, 2]), reduction="sum")
    loss.backward()
    assert float(loss.detach()) == pytest.approx(2 * np.log(2))
    assert logits.grad.tolist() == [[0.5, -0.5, 0.0, 0.0], [0.0, 0.0, -0.5, 0.5]]
    with pytest.raises(LoraforgeError, match="outside the head") as error:
        LabelMask({0: (0, 4)}, 4)
    assert error.value.where == "task 0"


@pytest.mark.parametrize("left", [False, True])
def test_rows_come_out_of_a_batch_as_they_went_in(left):
    same = [row | {"labels": row["input_ids"] + 1} for row in text_rows(4)]  # targets as long as the inputs
    for rows in (text_rows(4), pair_rows(4), same, models.class_rows(3), image_rows(2)):
        shifted = int(rows[0]["labels"].dim() and rows[0]["labels"][0]) == -100
        out = rows_of(collate(rows, left=left, extra=2), shifted)
        for row, original in zip(out, rows, strict=True):
            assert row.keys() == original.keys() - {"attention_mask"}
            for key in row:
                wanted = original[key]
                assert torch.equal(row[key], wanted), key


def test_two_batches_as_one():
    short, long = collate(text_rows(2, 1, (4, 4))), collate(text_rows(3, 2, (6, 6)))
    both = joined(short, long)
    assert both["input_ids"].shape == (5, 6)
    assert torch.equal(both["input_ids"][:2, :4], short["input_ids"]) and torch.equal(
        both["labels"][2:], long["labels"]
    )
    assert int(both["attention_mask"][:2, 4:].sum()) == 0 and bool((both["labels"][:2, 4:] == -100).all())
    # 2 x 4 + 3 x 6 tokens of ids and of labels, in 5 x 6.
    assert wasted(short, long) == pytest.approx(1 - 26 / 30)
    assert wasted(collate(image_rows(1)), collate(image_rows(2))) == 0.0
    assert wasted(short, collate(image_rows(2))) == 1.0


def test_rows_without_targets_are_known():
    row = {"labels": torch.tensor([4, -100, -100])}
    assert not has_targets(row, shifted=True) and has_targets(row, shifted=False)
    assert has_targets({"labels": torch.tensor(0)}, shifted=False)
