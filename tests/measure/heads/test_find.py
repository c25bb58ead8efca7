"""Layouts of real architectures, in memory and on disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from loraforge.checkpoints import open_checkpoint
from loraforge.errors import LoraforgeError
from loraforge.measure.heads.find import layout_of_checkpoint, layout_of_model, modules_of
from loraforge.measure.heads.layout import HeadLayout
from tests.measure.tiny_heads import ARCHITECTURES, build, composed
from tests.tasks.tiny import FAMILIES, tiny_base

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@every_architecture
def test_the_layout_of_an_architecture_is_found(name: str) -> None:
    known, model = ARCHITECTURES[name], build(name)
    layout = layout_of_model(model)
    assert tuple(f"{a.stack} {a.kind} {a.layer}" for a in layout.attentions) == known.stacks
    last = layout.attentions[-1]
    assert (last.n_q, last.n_kv, last.o.size) == known.heads
    assert last.o.module == known.last
    assert "".join(part for part in "qkv" if last.part(part) is not None) == known.parts
    assert all(a.o.module.startswith(f"{a.block}.") for a in layout.attentions)
    assert layout.family == model.config.model_type
    modules = modules_of(model)
    for attention in layout.attentions:
        for part in ("q", "k", "v", "o"):
            projection = attention.part(part)
            if projection is not None:
                shape = tuple(modules[projection.module].weight.shape)
                rows, columns = shape[::-1] if projection.transposed else shape
                heads = [attention.span(part, head) for head in range(attention.n_q)]
                assert max(span.stop for span in heads if span) <= (columns if part == "o" else rows)
    assert HeadLayout.from_json(layout.to_json()) == layout


@every_architecture
def test_a_checkpoint_has_the_layout_of_its_model(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path)
    found = layout_of_checkpoint(open_checkpoint(tmp_path))
    expected = layout_of_model(model)
    assert found.family == expected.family
    assert len(found.attentions) == len(expected.attentions)
    for ours, theirs in zip(found.attentions, expected.attentions, strict=True):
        assert (ours.stack, ours.kind, ours.layer, ours.n_q, ours.n_kv) == (
            theirs.stack, theirs.kind, theirs.layer, theirs.n_q, theirs.n_kv,
        )  # fmt: skip
        for part in ("q", "k", "v", "o"):
            here, there = ours.part(part), theirs.part(part)
            assert (here is None) == (there is None)
            if here is not None and there is not None:
                # Files may keep the names of older releases; what is a head in them is the same.
                assert (here.heads, here.size, here.offset, here.stride, here.transposed) == (
                    there.heads, there.size, there.offset, there.stride, there.transposed,
                )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_with_its_head_has_the_layout_of_its_file(family: str, tmp_path: Path) -> None:
    from transformers import AutoModel

    base = tiny_base(tmp_path / family, family)
    if family == "blip":
        from transformers import BlipForConditionalGeneration as Loader
    else:
        Loader = AutoModel
    there = layout_of_checkpoint(open_checkpoint(base))
    loaded = layout_of_model(Loader.from_pretrained(base))
    assert there.heads == loaded.heads


def test_heads_that_a_composed_model_leaves_out_of_its_file_are_found(tmp_path: Path) -> None:
    model = composed("llava")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    # As transformers writes it where the number is the default of the part, 12 in CLIP's.
    del config["vision_config"]["num_attention_heads"]
    config["vision_config"]["hidden_size"] = 24
    (tmp_path / "config.json").write_text(json.dumps(config))
    file = tmp_path / "model.safetensors"
    tensors = {n: torch.zeros(24, 24) if ".out_proj.weight" in n else t for n, t in load_file(file).items()}
    save_file({n: t for n, t in tensors.items() if "vision" not in n or "out_proj.weight" in n}, file)
    layout = layout_of_checkpoint(open_checkpoint(tmp_path))
    assert {(a.stack, a.n_q, a.o.size) for a in layout.attentions} == {("enc", 12, 2), ("dec", 4, 4)}


def test_a_plain_checkpoint_is_laid_out_without_transformers(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    script = (
        "import sys; from loraforge.checkpoints import open_checkpoint; from loraforge.measure.heads.find import "
        f"layout_of_checkpoint as of; found = of(open_checkpoint({str(tmp_path)!r})); "
        "print(len(found.heads), 'transformers' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["8", "False"]


def test_hybrid_models_say_which_layers_they_pass_over() -> None:
    assert set(layout_of_model(build("qwen3_next")).skipped) == {f"layers.{i}.linear_attn" for i in range(3)}
    assert set(layout_of_model(build("bamba")).skipped) == {"layers.0.mamba"}
    assert set(layout_of_model(build("jamba")).skipped) == {"layers.0.mamba"}


def test_a_query_projection_that_holds_gates_as_well_has_wider_heads() -> None:
    attention = layout_of_model(build("qwen3_next")).attentions[0]
    assert attention.q is not None
    assert (attention.q.size, attention.o.size) == (16, 8)


def test_towers_are_told_apart_or_refused() -> None:
    layout = layout_of_model(composed("llava"))
    assert {(a.stack, a.n_q, a.n_kv) for a in layout.attentions} == {("enc", 4, 4), ("dec", 4, 2)}
    clip = composed("clip")
    with pytest.raises(LoraforgeError, match="two attentions of the model would have the same name"):
        layout_of_model(clip)
    assert [a.n_q for a in layout_of_model(clip.text_model).attentions] == [2, 2]
    assert [a.n_q for a in layout_of_model(clip.vision_model).attentions] == [4, 4]
    both = layout_of_model(composed("bert-gpt2"))
    assert [f"{a.stack} {a.kind}" for a in both.attentions] == [
        "enc self", "enc self", "dec self", "dec cross", "dec self", "dec cross",
    ]  # fmt: skip
    cross = both.attentions[-1]
    assert cross.q is not None and cross.k is not None and cross.v is not None
    assert cross.q.module.endswith("q_attn") and (cross.k.offset, cross.v.offset) == (0, 16)


class Transformer(nn.Module):
    """A model of PyTorch's own layers, whose attention reads its weights without calling its modules."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def test_multihead_attention_is_refused_with_the_reason(tmp_path: Path) -> None:
    model = Transformer()
    with pytest.raises(LoraforgeError, match="nn.MultiheadAttention reads its weights") as caught:
        layout_of_model(model)
    assert caught.value.exit_code == 3
    torch.save(model.state_dict(), tmp_path / "model.pt")
    with pytest.raises(LoraforgeError, match="nn.MultiheadAttention reads its weights"):
        layout_of_checkpoint(open_checkpoint(tmp_path / "model.pt"))


def test_multihead_attention_beside_others_is_passed_over(tmp_path: Path) -> None:
    import transformers as tf

    from tests.measure.tiny_heads import _PICTURE

    model = tf.SiglipVisionModel(tf.SiglipVisionConfig(**_PICTURE))
    model.save_pretrained(tmp_path)
    layout = layout_of_model(model)
    assert [a.n_q for a in layout.attentions] == [4, 4]
    assert "nn.MultiheadAttention" in layout.skipped["head.attention"]
    assert any(name.endswith("head.attention") for name in layout_of_checkpoint(open_checkpoint(tmp_path)).skipped)


def test_a_model_without_known_attention_lists_what_it_has() -> None:
    import transformers as tf

    config = tf.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 4], window_size=2)
    with pytest.raises(LoraforgeError, match=r"no attention is known.*\n.*SwinModel\n.*attention\.q_proj"):
        layout_of_model(tf.SwinModel(config))
    with pytest.raises(LoraforgeError, match="no module with a matrix"):
        layout_of_model(nn.Embedding(4, 4))


def test_a_single_file_does_not_say_its_heads(tmp_path: Path) -> None:
    torch.save(build("bert").state_dict(), tmp_path / "model.pt")
    with pytest.raises(LoraforgeError, match="the number of heads is not known"):
        layout_of_checkpoint(open_checkpoint(tmp_path / "model.pt"))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_names_are_those_without_an_adapter() -> None:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    model = build("deberta-v2")
    layout = layout_of_model(model)
    targets = ["query_proj", "attention.output.dense"]
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    assert layout_of_model(wrapped) == layout
    modules = modules_of(wrapped)
    # The outer layer: gates act on the adapter as on its base.
    assert isinstance(modules[layout.attentions[0].o.module], LoraLayer)
    assert not any("lora_" in name or "base_layer" in name for name in modules)
