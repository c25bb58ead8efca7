"""Input statistics against samples that run alone, unpadded, under hooks written here: no mask is needed then."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loraforge.calibrate.base import prefer_kwargs
from loraforge.calibrate.batches import make_batches
from loraforge.calibrate.data import load_calibration
from loraforge.calibrate.input_statistics import InputSums, batches_digest, model_digest, trace_targets
from loraforge.calibrate.input_targets import Target, choose_targets
from loraforge.errors import LoraforgeError

from .models import inputs_of, make

# Forwards in float64: what differs is the rounding of padded against unpadded sums.
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def collect(model, inputs, kind="diag", targets=None, batch_tokens=40):
    """(statistics, tokens, skipped) of a model in memory."""
    cset = load_calibration(inputs, name="data", model_config=getattr(model, "config", None))
    batches = make_batches([cset], [[0] * len(cset)], batch_tokens=batch_tokens)
    chosen, _ = choose_targets(model, targets)
    options = dict(prefer_kwargs(model))
    trace, skipped = trace_targets(model, chosen, batches, options, lenient=targets is None)
    sums = InputSums(model, {n: t for n, t in chosen.items() if n not in skipped}, trace, kind, options)
    for batch in batches:
        sums.add(batch)
    return sums.means(), sums.tokens, skipped


def alone(model, inputs):
    """{module: (tokens, features)} of every Linear and Conv1D, each sample by itself without its padding."""
    rows: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: rows.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    for i in range(next(iter(inputs.values())).shape[0]):
        one = {key: value[i : i + 1].clone() for key, value in inputs.items()}
        for side in ("", "decoder_"):
            if f"{side}attention_mask" in one:
                length = int(one[f"{side}attention_mask"].sum())
                for key in (f"{side}input_ids", f"{side}attention_mask"):
                    one[key] = one[key][:, :length]
        with torch.no_grad():
            model(**one, **prefer_kwargs(model))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}


@pytest.mark.parametrize("kind", ["diag", "gram"])
@pytest.mark.parametrize("family", ["bert", "llama", "t5", "vit", "gpt2"])
def test_equals_samples_that_run_alone(family: str, kind: str) -> None:
    model = make(family).model
    inputs = inputs_of(family, torch.Generator().manual_seed(3), 6, 8)
    if family == "vit":  # images are kept in float32
        inputs["pixel_values"] = inputs["pixel_values"].float().double()
    found, tokens, skipped = collect(model, inputs, kind)
    expected = alone(model, inputs)
    assert found.keys() == expected.keys() and not skipped
    for name, X in expected.items():
        exact = X.T @ X / X.shape[0]
        assert tokens[name] == X.shape[0]
        assert found[name].dtype == torch.float64
        torch.testing.assert_close(found[name], exact if kind == "gram" else exact.diagonal(), **CLOSE)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_padding_and_batch_size_change_nothing(family: str) -> None:
    model = make(family).model
    inputs = inputs_of(family, torch.Generator().manual_seed(3), 6, 8)
    found, tokens, _ = collect(model, inputs, batch_tokens=10**6)
    single, same, _ = collect(model, inputs, batch_tokens=1)
    wider = {key: nn.functional.pad(value, (0, 5)) for key, value in inputs.items()}
    wider["input_ids"][wider["attention_mask"] == 0] = 49  # what stands under padding is not looked at
    padded, counted, _ = collect(model, wider, batch_tokens=10**6)
    assert tokens == same == counted
    for name, value in found.items():
        torch.testing.assert_close(single[name], value, **CLOSE)
        torch.testing.assert_close(padded[name], value, **CLOSE)


def test_holes_and_left_padding_are_left_out() -> None:
    model = make("llama").model
    ids = torch.randint(3, 50, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0]])
    found, tokens, _ = collect(model, {"input_ids": ids, "attention_mask": mask}, targets="gate_proj")
    seen: list[Tensor] = []
    name = "model.layers.0.mlp.gate_proj"
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    torch.testing.assert_close(found[name], seen[0][mask.bool()].square().mean(dim=0), **CLOSE)
    assert set(tokens.values()) == {14}


class Attention(nn.Module):
    """Self-attention by nn.MultiheadAttention, then (where `crossed`) one whose keys are another tensor."""

    def __init__(self, batch_first: bool = True, bias: bool = True, crossed: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.own = nn.MultiheadAttention(8, 2, bias=bias, batch_first=batch_first)
        self.other = nn.MultiheadAttention(8, 2, batch_first=batch_first) if crossed else None
        self.batch_first = batch_first

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.embed(input_ids)
        h = h if self.batch_first else h.transpose(0, 1)
        y, _ = self.own(h, h, h, key_padding_mask=attention_mask == 0, need_weights=False)
        if self.other is not None:
            y, _ = self.other(y, h, h, key_padding_mask=attention_mask == 0)
        return y


def heads(module: nn.MultiheadAttention, X: Tensor) -> Tensor:
    """What enters the output projection for one sample X (t, 8), by the formula."""
    Q, K, V = (X @ module.in_proj_weight.T + (0 if module.in_proj_bias is None else module.in_proj_bias)).split(8, -1)
    Q, K, V = (T.reshape(-1, 2, 4).transpose(0, 1) for T in (Q, K, V))
    weights = torch.softmax(Q @ K.mT / 2.0, dim=-1)
    return (weights @ V).transpose(0, 1).reshape(-1, 8)


@pytest.mark.parametrize("kind", ["diag", "gram"])
@pytest.mark.parametrize(("batch_first", "bias"), [(True, True), (False, False)])
def test_multihead_attention_has_both_projections(batch_first: bool, bias: bool, kind: str) -> None:
    torch.manual_seed(0)
    net = Attention(batch_first, bias).double().eval()
    inputs = inputs_of("bert", torch.Generator().manual_seed(1), 5, 6)
    found, tokens, skipped = collect(net, inputs, kind)
    assert list(found) == ["own.in_proj_weight", "own.out_proj"] and not skipped
    with torch.no_grad():
        samples = [net.embed(ids[mask.bool()]) for ids, mask in zip(*inputs.values(), strict=True)]
        rows = {
            "own.in_proj_weight": torch.cat(samples),
            "own.out_proj": torch.cat([heads(net.own, X) for X in samples]),
        }
    for name, X in rows.items():
        exact = X.T @ X / X.shape[0]
        assert tokens[name] == X.shape[0]
        torch.testing.assert_close(found[name], exact if kind == "gram" else exact.diagonal(), **CLOSE)
    assert not net.own._forward_hooks and torch.backends.mha.get_fastpath_enabled()


def test_a_packed_projection_of_several_inputs_is_named() -> None:
    net = Attention(crossed=True).double().eval()
    inputs = inputs_of("bert", torch.Generator().manual_seed(1), 5, 6)
    found, _, skipped = collect(net, inputs)
    assert list(skipped) == ["other.in_proj_weight"] and "differ" in skipped["other.in_proj_weight"]
    assert list(found) == ["own.in_proj_weight", "own.out_proj", "other.out_proj"]
    with pytest.raises(LoraforgeError, match="no input to measure") as caught:
        collect(net, inputs, targets=["other.in_proj_weight"])
    assert "query, key and value differ" in str(caught.value.got)


class Toy(nn.Module):
    """a runs twice, `spare` never, `bad` gets no samples."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 4)
        self.a, self.spare, self.bad = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.a(self.a(self.embed(input_ids))) + self.bad(self.embed.weight[:3]).mean()


def test_a_module_that_runs_twice_counts_both_inputs_and_others_are_named() -> None:
    net = Toy().double().eval()
    inputs = inputs_of("bert", torch.Generator().manual_seed(1), 4, 5)
    found, tokens, skipped = collect(net, inputs)
    with torch.no_grad():
        X = net.embed(inputs["input_ids"][inputs["attention_mask"].bool()])
        both = torch.cat([X, net.a(X)])
    assert list(found) == ["a"] and tokens == {"a": both.shape[0]}
    torch.testing.assert_close(found["a"], both.square().mean(dim=0), **CLOSE)
    assert "never runs" in skipped["spare"] and "told apart" in skipped["bad"]
    with pytest.raises(LoraforgeError, match="no input to measure"):
        collect(net, inputs, targets="spare")


def test_inputs_that_are_not_finite_are_refused() -> None:
    net = Toy().double().eval()
    with torch.no_grad():
        net.embed.weight[7] = float("nan")
    inputs = {"input_ids": torch.full((2, 3), 7), "attention_mask": torch.ones(2, 3, dtype=torch.int64)}
    with pytest.raises(LoraforgeError, match="NaN or Inf") as caught:
        collect(net, inputs)
    assert caught.value.where == "a"


def test_gram_of_modules_with_one_input_is_kept_once() -> None:
    model = make("llama").model
    found, _, _ = collect(
        model, inputs_of("llama", torch.Generator().manual_seed(0), 4, 6), "gram", ["q_proj", "k_proj"]
    )
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]
    assert found[names[0]] is found[names[1]]


def test_digests_tell_models_and_data_apart() -> None:
    one, same, other = make("bert").model, make("bert").model, make("bert", seed=1).model
    assert model_digest(one) == model_digest(same) != model_digest(other)
    csets = [load_calibration(inputs_of("bert", torch.Generator().manual_seed(s), 4, 6), name="x") for s in (0, 0, 1)]
    digests = [batches_digest(make_batches([c], [[0] * len(c)], batch_tokens=20)) for c in csets]
    assert digests[0] == digests[1] != digests[2]
    assert digests[0] != batches_digest(make_batches([csets[0]], [[0] * 4], batch_tokens=10))


def test_target_is_the_attention_itself() -> None:
    net = Attention()
    chosen, _ = choose_targets(net, None)
    assert chosen["own.out_proj"].module is net.own and isinstance(chosen["own.out_proj"], Target)
