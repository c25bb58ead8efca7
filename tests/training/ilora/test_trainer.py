"""The trainer: loss and gradient of a micro-step, the average along a run, and what leaves training as it was."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from transformers.trainer_callback import TrainerCallback

from loraforge.errors import InputProblems, LoraforgeError
from loraforge.training.ilora.adapters import add_stable
from loraforge.training.ilora.buffer import ReplayBuffer
from loraforge.training.ilora.config import ILoraConfig
from loraforge.training.ilora.consistency import LabelMask
from loraforge.training.trainer import TaskTrainer
from tests.oracles import ilora as oracle
from tests.training.ilora.models import (
    bert,
    class_rows,
    collate,
    config,
    image_rows,
    llama,
    pair_rows,
    t5,
    text_rows,
    trainer,
    vit,
    weights,
)

KINDS = {
    "causal": (llama, text_rows),
    "text-to-text": (t5, pair_rows),
    "classification": (bert, class_rows),
    "images": (vit, image_rows),
}


def reference(model, kind, current, replayed, weight, rule="elementwise"):
    """Parts of the loss, by PEFT's own switch and transformers' own losses, row batches padded apart."""
    batches = [{key: value for key, value in collate(rows).items() if key != "task"} for rows in (current, replayed)]
    model.train()
    plastic = [model(**batch, output_hidden_states=True) for batch in batches]
    names = "decoder_hidden_states" if kind == "text-to-text" else "hidden_states"
    stable_model = copy.deepcopy(model).eval()
    stable_model.set_adapter("ema")
    with torch.no_grad():
        stable = stable_model(**batches[1], output_hidden_states=True)
    P, S = ([getattr(out, names)[layer] for layer in (-1, -2, -3)] for out in (plastic[1], stable))
    mask = None
    if kind in ("causal", "classification"):
        mask = batches[1]["attention_mask"].numpy()
    elif kind == "text-to-text":
        mask = (batches[1]["labels"] != -100).numpy()
    pulls, _ = oracle.consistency_loss([x.detach().numpy() for x in P], [x.numpy() for x in S], mask, rule)
    weights_of = torch.ones(P[0].shape[:2]) if mask is None else torch.tensor(mask).float()
    pull = sum((weights_of[..., None] * (torch.relu(s - p) ** 2)).sum() for p, s in zip(P, S, strict=True))
    pull = pull / (weights_of.sum() * sum(p.shape[-1] for p in P))
    total = (plastic[0].loss + plastic[1].loss) / 2 + weight * pull
    return total, float(plastic[0].loss.detach()), float(plastic[1].loss.detach()), pulls


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def one_step(tr, rows):
    """Loss of one micro-step and the gradients it leaves."""
    tr.model.train()
    tr.current_gradient_accumulation_steps = 1
    loss = tr.compute_loss(tr.model, collate(rows))
    loss.backward()
    return float(loss.detach())


def moved(model, by=0.05):
    """The stable adapter, away from the plastic one."""
    add_stable(model)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "ema" in name.split("."):
                p.add_(torch.randn(p.shape, generator=draw) * by)
    return model


@pytest.mark.parametrize("fused", ["always", "never"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_of_a_micro_step(kind, fused, tmp_path):
    build, rows = KINDS[kind]
    past, current = rows(3, 1), rows(2, 2, task=1)
    model = moved(build())
    settings = config(consistency_weight=0.7, replay_batch_size=3, fused_forward=fused)
    tr = trainer(model, current, tmp_path, settings, kind=kind, past=past, stable=False)
    total, ce_current, ce_replay, pull = reference(copy.deepcopy(model), kind, current, past, 0.7)
    other = copy.deepcopy(model)
    reference(other, kind, current, past, 0.7)[0].backward()
    assert one_step(tr, current) == pytest.approx(float(total.detach()), rel=2e-6)
    assert float(total.detach()) == pytest.approx(oracle.total_loss(ce_current, ce_replay, pull, 0.7), rel=1e-6)
    assert pull > 1e-4
    mine, theirs = gradients(model), gradients(other)
    assert mine.keys() == theirs.keys() and not any("ema" in name.split(".") for name in mine)
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, rtol=2e-4, atol=1e-6)


def test_the_average_of_a_real_run_has_its_closed_form(tmp_path):
    model = llama()
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append((weights(model), weights(model, "ema")))

    values = {"gradient_accumulation_steps": 2, "max_steps": 5}
    tr = trainer(
        model, text_rows(9, task=1), tmp_path, config(), past=text_rows(4, 7), train=values, callbacks=[Watch()]
    )
    start = weights(model)
    tr.train()
    end, ema = weights(model), weights(model, "ema")
    assert tr.state.global_step == 5 and len(seen) == 5
    for name in start:
        path = [plastic[name].double().numpy() for plastic, _ in seen]
        wanted = oracle.ema_closed_form(start[name].double().numpy(), path, 0.25)
        np.testing.assert_allclose(ema[name].numpy(), wanted, atol=1e-6)
        steps = oracle.ema_trajectory(start[name].double().numpy(), path, 0.25)
        for step in range(1, 5):  # callbacks of the user come before the average's own
            np.testing.assert_allclose(seen[step][1][name].numpy(), steps[step - 1], atol=1e-6)
        assert not torch.equal(start[name], end[name]) and not torch.equal(ema[name], start[name])


@pytest.mark.parametrize(
    "values", [{"ema_every": 3}, {"ema_warmup": True, "ema_alpha": 0.1}, {"ema_convention": "decay"}]
)
def test_options_of_the_average_act_in_a_run(values, tmp_path):
    model = llama()
    settings = config(**values)
    path = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            path.append(weights(model))

    start = weights(model)
    trainer(model, text_rows(8, task=1), tmp_path, settings, callbacks=[Watch()]).train()
    for name, tensor in weights(model, "ema").items():
        wanted = start[name].double().numpy()
        for step, plastic in enumerate(path, 1):
            if step % settings.ema_every == 0:
                a = oracle.new_weight(settings.ema_alpha, step, settings.ema_convention, settings.ema_warmup)
                wanted = wanted + a * (plastic[name].double().numpy() - wanted)
        np.testing.assert_allclose(tensor.numpy(), wanted, atol=1e-6)


def test_a_skipped_optimiser_step_leaves_the_average(tmp_path, monkeypatch):
    model = llama()
    tr = trainer(model, text_rows(8, task=1), tmp_path, config())
    before = weights(model, "ema")
    monkeypatch.setattr(type(tr.accelerator), "optimizer_step_was_skipped", property(lambda self: True))
    tr.train()
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(model, "ema").items())


@pytest.mark.parametrize(
    "settings",
    [
        ILoraConfig(),
        config(consistency_weight=0, ilora_buffer_size=0),
        config(ilora_buffer_size=0),
        config(),  # the first task: there is nothing to replay yet
    ],
    ids=["off", "no buffer, no weight", "no buffer", "nothing to replay"],
)
def test_with_nothing_to_add_training_is_plain_to_the_bit(settings, tmp_path):
    values = {"max_steps": 5, "gradient_accumulation_steps": 2}
    plain, ours = llama(dropout=0.3), llama(dropout=0.3)
    rows = text_rows(10)
    tr = trainer(ours, rows, tmp_path / "a", settings, train=values, task_index=0)
    tr.train()
    other = TaskTrainer(plain, tr.args, kind="causal", collate=collate, train_rows=rows)
    other.train()
    mine, theirs = weights(ours), weights(plain)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    losses = [[log["loss"] for log in one.state.log_history if "loss" in log] for one in (tr, other)]
    assert losses[0] == losses[1] and len(losses[0]) == 5


def test_experience_replay_needs_no_stable_adapter(tmp_path):
    model = llama()
    past, current = text_rows(2, 1), text_rows(2, 2, task=1)
    tr = trainer(model, current, tmp_path, config(consistency_weight=0, ema_every=0), past=past)
    assert tr.pairs is None and "ema" not in model.peft_config
    add_stable(model)
    want = reference(copy.deepcopy(model), "causal", current, past, 0.0)[0]
    assert one_step(tr, current) == pytest.approx(float(want.detach()), rel=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_equal_plain_ones(reentrant, tmp_path):
    past, current = text_rows(3, 1), text_rows(2, 2, task=1)
    found = []
    for on in (False, True):
        model = moved(llama())
        if on:
            base = model.get_base_model()
            enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
            base.enable_input_require_grads()
        tr = trainer(model, current, tmp_path, config(replay_batch_size=3), past=past, stable=False)
        one_step(tr, current)
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys() and len(found[0]) == 12
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("left", "extra"), [(True, 0), (False, 5), (True, 3)])
def test_padding_changes_nothing(left, extra, tmp_path):
    past, current = text_rows(3, 1), text_rows(2, 2, task=1)
    found = []
    for options in ({}, {"left": left, "extra": extra}):
        model = moved(llama())
        settings = config(replay_batch_size=3)
        padded = lambda rows, options=options: collate(rows, **options)  # noqa: E731
        tr = trainer(model, current, tmp_path, settings, past=past, stable=False, collate=padded)
        tr.model.train()
        tr.current_gradient_accumulation_steps = 1
        loss = tr.compute_loss(tr.model, padded(current))
        loss.backward()
        found.append((float(loss.detach()), tr._figures.taken(0), gradients(model)))
    # Rotary positions of rows padded on the left are shifted: equal but for rounding.
    for name in ("ce_current", "ce_replay", "l_cons", "kept_fraction"):
        assert found[0][1][name] == pytest.approx(found[1][1][name], rel=2e-5)
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for name, gradient in found[0][2].items():
        torch.testing.assert_close(found[1][2][name], gradient, rtol=1e-3, atol=2e-6)


def test_two_micro_batches_equal_one_batch_with_replay(tmp_path):
    past, current = text_rows(3, 1, (6, 6)), text_rows(8, 2, (6, 6), task=1)
    found = []
    for size, micro in ((4, 1), (2, 2)):
        values = {"per_device_train_batch_size": size, "gradient_accumulation_steps": micro, "max_steps": 3}
        model = llama()
        # Every stored row is drawn, and nothing new displaces one.
        settings = config(replay_batch_size=50, ilora_buffer_size=50)
        tr = trainer(model, current, tmp_path, settings, past=past, train=values)
        tr.train()
        found.append((weights(model), weights(model, "ema"), [log["loss"] for log in tr.state.log_history[:3]]))
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-5)
    for one, other in zip(found[0][:2], found[1][:2], strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=2e-5)


def test_flags_and_optimiser_stay_through_a_run(tmp_path):
    model = bert()
    flags = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            flags.append({name for name, p in model.named_parameters() if p.requires_grad})
            layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer | ModulesToSaveWrapper)]
            assert {name for layer in layers for name in layer.active_adapters} == {"default"} and len(layers) == 7

    tr = trainer(
        model,
        class_rows(8, task=1),
        tmp_path,
        config(),
        kind="classification",
        past=class_rows(4, 3),
        callbacks=[Watch()],
    )
    tr.train()
    assert flags == [flags[0]] * 4 and len(flags[0]) == 14
    held = {id(p) for group in tr.optimizer.param_groups for p in group["params"]}
    assert held == {id(pair.plastic) for pair in tr.pairs.pairs}
    assert all(p.grad is None for name, p in model.named_parameters() if "ema" in name.split("."))


def test_an_optimiser_with_other_tensors_is_refused(tmp_path):
    model = llama()
    tr = trainer(model, text_rows(4), tmp_path, config())
    tr.optimizer = torch.optim.SGD([pair.stable for pair in tr.pairs.pairs], lr=1.0)
    with pytest.raises(RuntimeError, match="the optimiser holds"):
        tr.train()


def test_rows_are_drawn_before_they_are_offered(tmp_path):
    tr = trainer(llama(), text_rows(4, task=1), tmp_path, config(replay_scope="all"))
    one_step(tr, text_rows(2, task=1))
    assert "ce_replay" not in tr._figures.taken(0) and len(tr.buffer) == 2
    one_step(tr, text_rows(2, 5, task=1))
    assert "ce_replay" in tr._figures.taken(0) and len(tr.buffer) == 4


def test_only_rows_of_earlier_tasks_are_replayed_by_default(tmp_path):
    past, current = text_rows(3, 1), text_rows(8, 2, task=1)
    tr = trainer(llama(), current, tmp_path, config(ilora_buffer_size=50, replay_batch_size=20), past=past)
    tr.train()
    replayed = [log["replay_task_hist"] for log in tr.state.log_history if "loss" in log]
    assert replayed == [{"0": 3}] * 4
    assert tr.buffer.histogram() == {0: 3, 1: 8}
    everything = trainer(
        llama(), current, tmp_path, config(ilora_buffer_size=50, replay_batch_size=20, replay_scope="all"), past=past
    )
    everything.train()
    assert [log["replay_task_hist"] for log in everything.state.log_history if "loss" in log] == [
        {"0": 3},
        {"0": 3, "1": 2},
        {"0": 3, "1": 4},
        {"0": 3, "1": 6},
    ]


def test_replay_every_other_step_and_the_size_of_a_draw(tmp_path):
    past = text_rows(8, 1)
    tr = trainer(llama(), text_rows(8, 2, task=1), tmp_path, config(replay_every=2), past=past)
    tr.train()
    assert [sum(log["replay_task_hist"].values()) for log in tr.state.log_history if "loss" in log] == [2, 0, 2, 0]


def test_a_draw_without_targets_counts_as_no_replay(tmp_path):
    past = [row | {"labels": torch.full_like(row["labels"], -100)} for row in text_rows(3)]
    tr = trainer(llama(), text_rows(4, 2, task=1), tmp_path, config(), past=past)
    loss = one_step(tr, text_rows(2, 2, task=1))
    taken = tr._figures.taken(0)
    assert "ce_replay" not in taken and taken["l_cons"] == 0.0 and loss == pytest.approx(taken["ce_current"])


def test_logs_hold_the_parts_of_the_loss(tmp_path):
    settings = config(consistency_weight=2.0)
    rows, past = text_rows(8, 2, task=1), text_rows(4, 1)
    tr = trainer(llama(), rows, tmp_path, settings, past=past, train={"logging_steps": 2})
    tr.train()
    logs = [log for log in tr.state.log_history if "loss" in log]
    assert [log["step"] for log in logs] == [1, 2, 4]
    for log in logs:
        # Micro-batches of one step each: the mean of the parts is the parts of the mean, but for token counts.
        assert log["loss"] == pytest.approx((log["ce_current"] + log["ce_replay"]) / 2 + 2 * log["l_cons"], rel=0.05)
        assert 0.0 < log["kept_fraction"] < 1.0 and log["ema_drift"] > 0
        assert log["buffer_fill"] == min(4 + 2 * log["step"], 8)
    assert logs[-1]["ema_drift"] == pytest.approx(tr.pairs.drift())


def test_labels_of_other_tasks_get_no_gradient(tmp_path):
    past, current = class_rows(4, 1, labels=(0, 1)), class_rows(4, 2, labels=(2, 3), task=1)
    model = bert(labels=4)
    tr = trainer(
        model,
        current,
        tmp_path,
        config(consistency_weight=0),
        kind="classification",
        past=[],
        label_ids={0: (0, 1), 1: (2, 3)},
    )
    loss = one_step(tr, current)
    batch = {key: value for key, value in collate(current).items() if key != "task"}
    labels = batch.pop("labels")
    want = torch.nn.functional.cross_entropy(model(**batch).logits[:, 2:], labels - 2)
    assert loss == pytest.approx(float(want.detach()), rel=1e-6)
    name = "classifier.modules_to_save.default.weight"
    (head,) = (p for full, p in model.named_parameters() if full.endswith(name))
    assert not head.grad[:2].any() and bool(head.grad[2:].any())
    # A batch of several tasks' rows, as joint training has them.
    labels_of = {0: (0, 1), 1: (2, 3)}
    tr = trainer(model, current, tmp_path, ILoraConfig(), kind="classification", label_ids=labels_of)
    mixed = one_step(tr, [past[0], current[0]])
    apart = [one_step(tr, [row]) for row in (past[0], current[0])]
    assert mixed == pytest.approx(sum(apart) / 2, rel=1e-6)


def test_rows_of_tasks_that_are_not_listed_may_have_any_label():
    mask = LabelMask({0: (0, 1), 2: (2, 3)}, 4)
    logits = mask(torch.zeros(4, 4), torch.tensor([2, -1, 1, 7]))
    assert torch.isinf(logits[0]).tolist() == [True, True, False, False]
    assert not torch.isinf(logits[1:]).any()


def test_the_token_rule_keeps_what_is_likelier(tmp_path):
    past, current = text_rows(3, 1), text_rows(2, 2, task=1)
    model = moved(llama())
    settings = config(selective_rule="token", replay_batch_size=3, fused_forward="always")
    tr = trainer(model, current, tmp_path, settings, past=past, stable=False)
    tr.model.train()
    tr.current_gradient_accumulation_steps = 1
    tr.compute_loss(tr.model, collate(current))
    taken = tr._figures.taken(0)
    batch = {key: value for key, value in collate(past).items() if key != "task"}
    stable_model = copy.deepcopy(model).eval()
    stable_model.set_adapter("ema")
    with torch.no_grad():
        plastic, stable = model(**batch, output_hidden_states=True), stable_model(**batch, output_hidden_states=True)
    keep = np.zeros(batch["labels"].shape, dtype=bool)
    for b, row in enumerate(batch["labels"].tolist()):
        for t in range(len(row) - 1):
            if row[t + 1] != -100:
                p, s = (float(out.logits[b, t].log_softmax(-1)[row[t + 1]]) for out in (plastic, stable))
                keep[b, t] = p > s
    mask = batch["attention_mask"].numpy()
    P, S = ([out.hidden_states[layer].numpy() for layer in (-1, -2, -3)] for out in (plastic, stable))
    wanted, _ = oracle.consistency_loss(P, S, mask, "token", keep_tokens=keep)
    assert taken["l_cons"] == pytest.approx(wanted, rel=1e-5) and wanted > 0
    assert taken["kept_fraction"] == pytest.approx((keep & (mask > 0)).sum() / mask.sum()) and keep.any()


@pytest.mark.parametrize(
    ("values", "kind", "match"),
    [
        ({"hidden_state_layers": [4]}, "causal", "does not have"),
        ({"hidden_state_layers": [-5]}, "causal", "does not have"),
        ({"hidden_state_layers": [3, -1]}, "causal", "twice"),
        ({"consistency_mask": "labels"}, "classification", "no answer tokens"),
    ],
)
def test_what_does_not_go_with_the_model_is_refused_before_the_first_step(values, kind, match, tmp_path):
    build, rows = KINDS[kind]
    with pytest.raises(LoraforgeError, match=match):
        trainer(build(), rows(2), tmp_path, config(**values), kind=kind)


def test_engines_that_part_the_weights_and_smoothing_over_other_tasks_are_refused(tmp_path):
    with pytest.raises(LoraforgeError, match="label smoothing"):
        trainer(
            bert(), class_rows(2), tmp_path, config(), kind="classification", label_ids={0: (0, 1), 1: (2, 3)},
            train={"label_smoothing_factor": 0.1},
        )  # fmt: skip
    tr = trainer(
        bert(), class_rows(2), tmp_path, config(consistency_mask="labels", consistency_weight=0), kind="classification"
    )
    tr.is_deepspeed_enabled = True
    tr.ilora = config(consistency_mask="labels")
    with pytest.raises(InputProblems, match="2 problems") as problems:
        tr._check()
    assert "DeepSpeed" in str(problems.value.problems[0])


def test_a_new_buffer_is_made_where_none_is_given(tmp_path):
    tr = trainer(
        llama(), text_rows(4), tmp_path, config(ilora_buffer_size=7, buffer_policy="task_balanced"), buffer=None
    )
    assert (tr.buffer.capacity, tr.buffer.policy, len(tr.buffer)) == (7, "task_balanced", 0)
    assert isinstance(tr.buffer, ReplayBuffer)
