"""Defects of the published implementations of I-LORA, one test each: ours does not have them.

Numbers are those of the list. 17 (gradients divided by the number of processes): test_ranks. 19 (weights in parts):
refused, test_trainer. 21 (a resume without `ema` or buffer): test_checkpoint.
"""

from __future__ import annotations

import builtins
import inspect

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from loraforge.errors import LoraforgeError
from loraforge.training.ilora import stable as stable_module
from loraforge.training.ilora.adapters import active, add_stable, load_adapter, pair_adapters, save_pair
from loraforge.training.ilora.buffer import ReplayBuffer
from loraforge.training.ilora.trainer import ILoraTrainer
from tests.training.ilora.models import PAD, bert, class_rows, collate, config, llama, text_rows, trainer, weights
from tests.training.ilora.test_trainer import gradients, moved, one_step


def setting(tmp_path, settings=None, *, build=llama, past=None, **more):
    model = moved(build())
    past = text_rows(3, 1) if past is None else past
    tr = trainer(model, text_rows(2, 2, task=1), tmp_path, settings or config(), past=past, stable=False, **more)
    return model, tr


def test_01_the_average_moves(tmp_path):
    """Both published codes update no tensor of `ema`. The closed form: test_trainer."""
    model = llama()
    tr = trainer(model, text_rows(4), tmp_path, config(), train={"max_steps": 2})
    before = weights(model, "ema")
    tr.train()
    after = weights(model, "ema")
    assert len(after) == 12 and all(not torch.equal(before[name], after[name]) for name in after)


def test_02_ema_is_saved_where_ema_is_looked_for(tmp_path):
    """One saved `default` at the root of the folder of `ema`, and loaded that."""
    model = moved(llama())
    save_pair(model, tmp_path)
    saved = load_file(tmp_path / "ema" / "adapter_model.safetensors")
    assert not (tmp_path / "ema" / "ema").exists() and len(saved) == 12
    add_stable(other := llama(seed=5))
    load_adapter(other, tmp_path / "ema", "ema")
    assert all(torch.equal(tensor, weights(model, "ema")[name]) for name, tensor in weights(other, "ema").items())
    assert any(not torch.equal(tensor, weights(model)[name]) for name, tensor in weights(other, "ema").items())


def test_03_replayed_rows_have_their_mask_and_padding_is_no_label(tmp_path):
    """No attention mask was stored, and inputs and labels were padded with 0."""
    past = text_rows(4, 1)
    assert len({len(row["labels"]) for row in past}) > 1
    _, tr = setting(tmp_path, past=past)
    batch = collate(tr.buffer.draw(4))
    lengths = sorted(len(row["input_ids"]) for row in past)
    assert sorted(batch["attention_mask"].sum(1).tolist()) == lengths
    assert bool((batch["labels"][batch["attention_mask"] == 0] == -100).all())


@pytest.mark.parametrize("left", [False, True])
def test_04_rows_are_stored_without_padding(left, tmp_path):
    """Padded rows were stored and padded once more, with a pad token that need not be the tokenizer's."""
    rows = text_rows(3, 2, task=1)
    _, tr = setting(tmp_path, collate=lambda rows: collate(rows, left=left, extra=4), past=[])
    one_step(tr, rows)
    tr.buffer.offer([], 0)
    stored = sorted(row["input_ids"].tolist() for row in tr.buffer.rows)
    assert stored == sorted(row["input_ids"].tolist() for row in rows)
    tr.model.train()
    tr.compute_loss(tr.model, collate(rows, left=left, extra=4))
    assert len(tr.buffer) == 3  # the same rows, known in spite of other padding
    assert all(PAD not in row["input_ids"] for row in tr.buffer.rows)


def test_05_rows_are_packed_on_the_cpu():
    """Lists of GPU tensors. 500 rows of 1024 tokens are to stay under 6 MB."""
    buffer = ReplayBuffer(500)
    draw = torch.Generator().manual_seed(0)
    for start in range(0, 500, 100):
        ids = torch.randint(0, 32000, (100, 1024), generator=draw)
        buffer.offer([{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids], start)
    assert len(buffer) == 500 and buffer.nbytes == 500 * 1024 * 2 * 4 < 6_000_000
    assert {tensor.device.type for row in buffer.rows for tensor in row.values()} == {"cpu"}


def test_06_a_buffer_outlives_its_process(tmp_path):
    _, tr = setting(tmp_path)
    tr.save_buffer(tmp_path / "b.safetensors")
    assert ReplayBuffer.load(tmp_path / "b.safetensors").histogram() == {0: 3}


def test_07_evaluation_leaves_the_buffer_and_adds_nothing_to_the_loss(tmp_path):
    model, tr = setting(tmp_path)
    rows = text_rows(3, 7, task=1)
    state = tr.buffer.state_dict()
    found = tr.evaluate(rows)
    assert tr.buffer.state_dict() == state
    batch = {key: value for key, value in collate(rows[:3]).items() if key != "task"}
    with torch.no_grad():
        losses = model.eval()(**batch).logits[:, :-1].transpose(1, 2)
    wanted = torch.nn.functional.cross_entropy(losses, batch["labels"][:, 1:])
    assert found["eval_loss"] == pytest.approx(float(wanted), rel=1e-5)


def test_08_a_failure_is_an_error_and_no_pair_is_one_too(tmp_path, monkeypatch):
    """Any failure of the average or of the consistency pass became a warning and a loss of 0."""
    _, tr = setting(tmp_path)

    def fails(*args, **kwargs):
        raise ValueError("a broken pass")

    monkeypatch.setattr(stable_module, "pull", fails)
    with pytest.raises(ValueError, match="a broken pass"):
        one_step(tr, text_rows(2, 2, task=1))
    with pytest.raises(LoraforgeError, match="no stable adapter"):
        trainer(llama(), text_rows(2), tmp_path, config(), stable=False)


@pytest.mark.parametrize(
    "values",
    [
        {"selective_update": False},
        {"selective_rule": "margin", "min_update_threshold": 0.05},
        {"selective_rule": "deadband", "min_update_threshold": 0.05},
        {"selective_rule": "token"},
        {"hidden_state_layers": [-1]},
        {"hidden_state_layers": "all", "selective_update": False},
        {"consistency_mask": "labels"},
        {"layer_normalise": True},
        {"consistency_weight": 3.0},
    ],
)
def test_09_every_flag_acts(values, tmp_path):
    """Flags were read and never used, and hidden values compared with token ids."""
    current = text_rows(2, 2, task=1)
    base = {"selective_update": False} if values.get("hidden_state_layers") == "all" else {}
    base = base | ({"hidden_state_layers": [-1, -2]} if values.get("hidden_state_layers") == "all" else {})
    plain = one_step(setting(tmp_path, config(**base))[1], current)
    assert one_step(setting(tmp_path, config(**values))[1], current) != pytest.approx(plain, rel=1e-7)


def test_09_the_threshold_is_inert_under_the_rule_of_the_document(tmp_path):
    current = text_rows(2, 2, task=1)
    losses = [one_step(setting(tmp_path, config(min_update_threshold=t))[1], current) for t in (0.1, 9.0)]
    assert losses[0] == losses[1]


def test_10_overridden_methods_keep_the_signatures_that_transformers_calls():
    """save_model took other arguments, so saving a checkpoint failed."""
    checked = set()
    for name, method in vars(ILoraTrainer).items():
        theirs = getattr(Trainer, name, None)
        if name.startswith("__") or not inspect.isfunction(method) or theirs is None:
            continue
        wanted = [p for p in inspect.signature(theirs).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
        inspect.signature(method).bind(*[None] * len(wanted))  # raises where they do not fit
        checked.add(name)
    assert {"compute_loss", "log", "_load_from_checkpoint"} <= checked


def test_11_there_is_one_model(tmp_path):
    """A second model was built from the configuration, Llama alone."""
    model, tr = setting(tmp_path)
    assert tr.model is model
    names = [name for name, _ in model.named_parameters()]
    assert sum("embed_tokens" in name for name in names) == 1


def test_12_a_micro_step_prints_nothing_and_reads_no_loss(tmp_path, monkeypatch):
    """.item() and print at every micro-step."""
    _, tr = setting(tmp_path)

    def refuse(*args, **kwargs):
        raise AssertionError("called in a micro-step")

    monkeypatch.setattr(torch.Tensor, "item", refuse)
    monkeypatch.setattr(torch.Tensor, "__float__", refuse)
    monkeypatch.setattr(builtins, "print", refuse)
    tr.model.train()
    tr.current_gradient_accumulation_steps = 1
    tr.compute_loss(tr.model, collate(text_rows(2, 2, task=1))).backward()
    assert all(pair.plastic.grad is not None for pair in tr.pairs.pairs)


def test_13_a_switch_leaves_requires_grad():
    """set_adapter turns the flags of both adapters."""
    model = moved(bert())
    pair_adapters(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    for name in ("ema", "default"):
        with active(model, name):
            assert {key: p.requires_grad for key, p in model.named_parameters()} == flags
    assert {key: p.requires_grad for key, p in model.named_parameters()} == flags
    assert not any(flag for name, flag in flags.items() if "ema" in name.split("."))


def test_14_default_is_active_when_the_backward_pass_runs_the_model_anew(tmp_path):
    """With `ema` active, checkpointed gradients are lost or land on `ema`. Equal gradients: test_trainer."""
    model, tr = setting(tmp_path)
    model.train()
    tr.current_gradient_accumulation_steps = 1
    loss = tr.compute_loss(model, collate(text_rows(2, 2, task=1)))
    layers = [module for module in model.modules() if hasattr(module, "_active_adapter")]
    assert len(layers) == 6 and all(layer.active_adapters == ["default"] for layer in layers)
    loss.backward()
    found = gradients(model)
    assert len(found) == 12 and all(bool(gradient.any()) for gradient in found.values())


def test_15_an_exception_in_between_restores_the_adapter_and_the_mode(tmp_path, monkeypatch):
    model, tr = setting(tmp_path)

    def fails(*args, **kwargs):
        raise KeyError("within the stable pass")

    monkeypatch.setattr(tr._stable, "_model", fails)
    with pytest.raises(KeyError):
        one_step(tr, text_rows(2, 2, task=1))
    assert all(m.active_adapters == ["default"] for m in model.modules() if hasattr(m, "_active_adapter"))
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(("fused", "forwards"), [("always", ["train", "eval"]), ("never", ["train", "train", "eval"])])
def test_16_no_forward_is_run_twice_and_no_other_layer_kept(fused, forwards, tmp_path):
    """Three forwards, two of them with a graph, and all hidden states."""
    model, tr = setting(tmp_path, config(fused_forward=fused))
    seen, kept = [], []

    def watch(module, args, kwargs, output):
        seen.append("train" if module.training else "eval")
        kept.append(None if output.hidden_states is None else [state is not None for state in output.hidden_states])
        if not module.training:
            assert not output.logits.requires_grad and output.logits.shape[1] == 1

    model.get_base_model().register_forward_hook(watch, with_kwargs=True)
    one_step(tr, text_rows(2, 2, task=1))
    assert seen == forwards
    if tr._stable.states.request is not True:
        assert kept[-1] == kept[-2] == [False, True, True, True]
    assert kept[0] is None or fused == "always"


def test_18_gradients_do_not_grow_with_accumulation(tmp_path):
    """A mean that the trainer takes for a share of a sum. A whole run: test_trainer."""
    current = text_rows(2, 2, task=1)
    found = []
    for micro_steps in (1, 4):
        model, tr = setting(tmp_path, config(replay_batch_size=3, ilora_buffer_size=3, buffer_dedup=True))
        tr.model.train()
        tr.current_gradient_accumulation_steps = micro_steps
        total = micro_steps * int((collate(current)["labels"][:, 1:] != -100).sum())
        state = tr.buffer.state_dict()
        for _ in range(micro_steps):
            tr.buffer.load_state_dict(state)
            loss = tr.compute_loss(tr.model, collate(current), num_items_in_batch=total)
            assert tr.loss_is_scaled_for_ga and tr.model_accepts_loss_kwargs  # what keeps the trainer from dividing
            loss.backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-7)


def test_20_a_hand_over_copies_tensors_and_merges_nothing(tmp_path):
    """Merging into a quantised base is unstable. The float32 average of bfloat16 adapters: test_ema, test_adapters."""
    model = moved(llama())
    base = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}
    save_pair(model, tmp_path)
    for adapter in ("default", "ema"):
        load_adapter(model, tmp_path / "ema", adapter)
    now = dict(model.named_parameters())
    assert all(torch.equal(tensor, now[name]) for name, tensor in base.items())
    plastic, stable = weights(model), weights(model, "ema")
    assert all(torch.equal(plastic[name], stable[name]) for name in plastic)


def test_24_an_initialisation_that_changes_the_base_is_not_done_twice():
    model = llama(init_lora_weights="pissa")
    base = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.detach().clone()
    add_stable(model)
    assert torch.equal(model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight, base)
    batch = {key: value for key, value in collate(class_rows(2)).items() if key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        plastic = model(**batch).logits
        with active(model, "ema"):
            assert torch.equal(model(**batch).logits, plastic)
