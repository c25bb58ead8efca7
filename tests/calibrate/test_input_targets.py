"""Which linear maps a model has, and how the user names them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loraforge.calibrate.input_targets import adapter_targets, choose_targets, find_targets
from loraforge.errors import LoraforgeError, UsageError

from .models import make


def test_every_linear_map_by_its_full_name() -> None:
    found, refused = find_targets(make("gpt2").model)
    assert "transformer.h.0.attn.c_attn" in found and "lm_head" in found and len(found) == 9
    assert set(refused) == {"transformer.wte", "transformer.wpe"}


def test_other_matrices_have_a_reason() -> None:
    net = nn.Sequential(nn.Conv1d(2, 3, 1), nn.Embedding(4, 5), nn.LayerNorm(5), nn.Linear(5, 5))
    net.register_parameter("experts", nn.Parameter(torch.ones(2, 3, 4)))
    net.register_parameter("token", nn.Parameter(torch.ones(1, 1, 4)))
    found, refused = choose_targets(net, None)
    assert list(found) == ["3"]
    assert refused == {"experts": "Sequential, 3 dimensions", "0": "Conv1d, 3 dimensions"}


@pytest.mark.parametrize(
    ("wanted", "count"),
    [
        ("q_proj", 2),
        ("q_proj,v_proj", 4),
        (["q_proj", "lm_head"], 3),
        (r".*layers\.1\.mlp\..*", 3),
        ("model.layers.0.self_attn.q_proj", 1),
        ([r".*q_proj", "k_proj, o_proj"], 6),
    ],
)
def test_names_last_parts_and_patterns(wanted, count: int) -> None:
    found, refused = choose_targets(make("llama").model, wanted)
    assert len(found) == count and refused == {}


def test_what_matches_nothing_is_a_usage_error() -> None:
    model = make("llama").model
    with pytest.raises(UsageError, match="names no module") as caught:
        choose_targets(model, "q_prj")
    assert "did you mean 'q_proj'" in str(caught.value.hint)
    with pytest.raises(UsageError, match="matches no module"):
        choose_targets(model, ".*q_prj")
    with pytest.raises(UsageError, match="no regular expression"):
        choose_targets(model, "(q_proj")


def test_a_named_embedding_is_refused_with_its_reason() -> None:
    with pytest.raises(LoraforgeError, match="no input statistic") as caught:
        choose_targets(make("llama").model, "embed_tokens")
    assert caught.value.where == "model.embed_tokens" and "indices" in str(caught.value.got)


def test_modules_of_an_adapter_keep_the_names_of_the_model() -> None:
    model = make("llama").model
    found = adapter_targets(model, ["layers.0.self_attn.q_proj"], {"layers.0.self_attn.q_proj": (16, 16)})
    assert list(found) == ["model.layers.0.self_attn.q_proj"]
    with pytest.raises(LoraforgeError, match="no such module"):
        adapter_targets(model, ["layers.7.self_attn.q_proj"])


def test_the_projections_of_an_attention_are_those_of_the_attention() -> None:
    net = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2), "wide": nn.MultiheadAttention(4, 2, kdim=6)})
    found, refused = find_targets(net)
    assert {name: target.part for name, target in found.items()} == {
        "attn.in_proj_weight": "packed", "attn.out_proj": "heads", "wide.out_proj": "heads",
    }  # fmt: skip
    assert set(refused) == {"wide.q_proj_weight", "wide.k_proj_weight", "wide.v_proj_weight"}
    assert adapter_targets(net, ["attn.out_proj"])["attn.out_proj"].part == "heads"


def test_a_wrapped_model_is_refused() -> None:
    net = nn.Module()
    net.base_layer = nn.Linear(2, 2)
    with pytest.raises(LoraforgeError, match="wrapped"):
        find_targets(nn.ModuleList([net]))
