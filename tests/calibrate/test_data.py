from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers as tf
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from loraforge.calibrate.data import load_calibration
from loraforge.calibrate.encode import model_kind
from loraforge.calibrate.sampling import Selection
from loraforge.errors import InputProblems, LoraforgeError, UsageError

WORDS = ["[PAD]", "[UNK]", "[EOS]", "good", "bad", "film", "a", "the", "yes", "no", "Question:", "Solution:", "anger"]
ONES = torch.ones(2, 3, dtype=torch.int64)
BERT = tf.BertConfig(
    vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=8
)
GPT2 = tf.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1, n_positions=16)
T5 = tf.T5Config(vocab_size=20, d_model=8, num_layers=1, num_heads=1, decoder_start_token_id=0, pad_token_id=0)
VIT = tf.ViTConfig(
    image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_channels=3
)


def tokenizer_of(words: list[str]) -> tf.PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]", model_max_length=16,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> tf.PreTrainedTokenizerFast:
    return tokenizer_of(WORDS)


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def ids(cset, i: int, key: str = "input_ids") -> list[int]:
    return cset.samples[i][key].tolist()


def test_jsonl_text_for_an_encoder(tmp_path, tokenizer) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "a good film", "label": 1}, {"text": "bad", "label": 0})
    cset = load_calibration(path, name="a", tokenizer=tokenizer, model_config=BERT)
    assert cset.name == "a" and len(cset) == cset.available == 2
    assert ids(cset, 0) == [6, 3, 5] and ids(cset, 1, "attention_mask") == [1]
    assert set(cset.samples[0]) == {"input_ids", "attention_mask", "token_type_ids"}
    assert cset.texts == ["a good film", "bad"] and cset.labels == [1, 0]
    assert cset.source == str(path) and len(cset.sha256) == 64


def test_targets_are_forced_on_a_decoder(tmp_path, tokenizer) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "a film", "target": "good yes"}, {"text": "bad", "target": "no"})
    cset = load_calibration(path, name="a", tokenizer=tokenizer, model_config=T5)
    assert ids(cset, 0, "decoder_input_ids") == [0, 3]  # [start, good]: the last label is never an input
    assert ids(cset, 1, "decoder_input_ids") == [0] and ids(cset, 0, "decoder_attention_mask") == [1, 1]
    assert cset.labels == ["good yes", "no"] and "token_type_ids" not in cset.samples[0]
    without = load_calibration(
        jsonl(tmp_path / "b.jsonl", {"text": "a film"}), name="b", tokenizer=tokenizer, model_config=T5
    )
    assert "decoder_input_ids" not in without.samples[0]


def test_targets_continue_the_text_of_a_causal_model(tokenizer) -> None:
    rows = [{"text": "a film", "target": "good"}, {"text": "the film ", "target": "bad"}]
    cset = load_calibration(rows, name="a", tokenizer=tokenizer, model_config=GPT2)
    assert ids(cset, 0) == [6, 5, 3] and ids(cset, 1) == [7, 5, 4]
    assert set(cset.samples[0]) == {"input_ids", "attention_mask"}  # GPT-2 would read token types as words
    encoder = load_calibration(rows, name="a", tokenizer=tokenizer, model_config=BERT)
    assert ids(encoder, 0) == [6, 5]
    by_task = load_calibration(rows, name="a", tokenizer=tokenizer, model_config=BERT, task_type="CAUSAL_LM")
    assert ids(by_task, 0) == [6, 5, 3]


def test_kind_of_model() -> None:
    assert [model_kind(c) for c in (BERT, GPT2, T5, VIT, None)] == [
        "encoder",
        "causal",
        "encoder-decoder",
        "encoder",
        "encoder",
    ]
    assert model_kind(GPT2, "SEQ_CLS") == "encoder" and model_kind(T5, "CAUSAL_LM") == "encoder-decoder"
    named = tf.BertConfig(architectures=["BertLMHeadModel"])
    assert model_kind(named) == "causal"


def test_templates_and_target_maps(tmp_path, tokenizer) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"goal": "a film", "sol": "good", "cls": 1}, {"goal": "bad", "sol": "the", "cls": 0}]))
    spec = {
        "source": str(path),
        "template": "Question: {goal}\nSolution: {sol}",
        "target": "cls",
        "target_map": {0: "no", 1: "yes"},
        "label_field": "cls",
    }
    cset = load_calibration(spec, name="a", tokenizer=tokenizer, model_config=T5)
    assert ids(cset, 0) == [10, 6, 5, 11, 3] and cset.labels == [1, 0]
    assert load_calibration(["the film"], name="a", tokenizer=tokenizer).texts == ["the film"]
    with pytest.raises(UsageError, match="did you mean 'template'"):
        load_calibration({"source": str(path), "templat": "x"}, name="a", tokenizer=tokenizer)


def test_the_emotion_data_work_by_template(data_dir, tokenizer) -> None:
    path = data_dir / "text" / "emotion" / "emoint" / "train.json"
    common = "Classify sentiment of following text into one these".split()
    config = tf.T5Config(**T5.to_diff_dict() | {"vocab_size": 40})
    cset = load_calibration(
        path, name="emoint", tokenizer=tokenizer_of(WORDS + common), model_config=config,
        template="{instruction}", target="output",
        selection=Selection(samples_num=60, select_long=True, if_balance=True), max_length=100,
    )  # fmt: skip
    assert len(cset) == 60 and cset.available == 5681
    assert sorted(cset.labels.count(name) for name in set(cset.labels)) == [15, 15, 15, 15]
    with pytest.raises(InputProblems, match="no field 'text'"):
        load_calibration(path, name="emoint", tokenizer=tokenizer)


def test_texts_are_cut_to_the_length(tokenizer) -> None:
    long = ["good " * 40]
    assert len(load_calibration(long, name="a", tokenizer=tokenizer, max_length=5).samples[0]["input_ids"]) == 5
    assert len(load_calibration(long, name="a", tokenizer=tokenizer, model_config=BERT).samples[0]["input_ids"]) == 8


def test_texts_are_cut_to_the_positions_of_the_model(tokenizer) -> None:
    texts = ["good " * 40, "a film"]
    with pytest.warns(UserWarning, match=r"cut to the 8 tokens .*max_length 12.*1 of 2 samples"):
        cset = load_calibration(texts, name="a", tokenizer=tokenizer, model_config=BERT, max_length=12)
    assert [len(sample["input_ids"]) for sample in cset.samples] == [8, 2]
    # Nothing is cut, nothing is said.
    assert len(load_calibration(["a film"], name="a", tokenizer=tokenizer, model_config=BERT, max_length=12)) == 1
    roberta = tf.RobertaConfig(vocab_size=20, max_position_embeddings=10, pad_token_id=1)
    with pytest.warns(UserWarning, match="cut to the 8 tokens"):
        cset = load_calibration(texts, name="a", tokenizer=tokenizer, model_config=roberta, max_length=12)
    tiny = tf.RobertaModel(
        tf.RobertaConfig(
            vocab_size=20, max_position_embeddings=10, pad_token_id=1, hidden_size=8, num_hidden_layers=1,
            num_attention_heads=1, intermediate_size=8,
        )
    )  # fmt: skip
    assert tiny(cset.samples[0]["input_ids"][None]).last_hidden_state.shape == (1, 8, 8)
    with pytest.raises(LoraforgeError, match="(?s)9 tokens.*at most 8"):
        load_calibration({"input_ids": torch.full((1, 9), 3)}, name="a", model_config=roberta, max_length=4)


def test_one_cause_in_many_samples_is_one_problem() -> None:
    with pytest.raises(LoraforgeError) as caught:
        load_calibration({"input_ids": torch.full((5, 3), 20)}, name="a", model_config=BERT)
    message = str(caught.value)
    assert not isinstance(caught.value, InputProblems) and message.count("outside the model's vocabulary") == 1
    assert "5 times in 5 samples: sample 0, input_ids, position 0: 20; sample 1" in message
    assert "and 2 more" in message and "sample 3" not in message
    with pytest.raises(InputProblems) as both:
        load_calibration({"input_ids": torch.full((20, 9), 20)}, name="a", model_config=BERT)
    assert len(both.value.problems) == 2 and "20 times in 20 samples: sample 0, input_ids: 9 tokens" in str(both.value)


def test_selection_comes_before_tokenising(tokenizer) -> None:
    rows = [f"good {'a ' * i}" for i in range(9)]
    first = load_calibration(rows, name="a", tokenizer=tokenizer, selection=Selection(samples_num=2, shuffle=False))
    assert first.texts == rows[:2] and first.available == 9
    again = load_calibration(first, name="a", selection=Selection(samples_num=1, shuffle=False))
    assert again.texts == rows[:1] and again.sha256 == first.sha256


def test_the_tokenizer_comes_from_the_base(tmp_path, tokenizer, data_dir) -> None:
    tokenizer.save_pretrained(tmp_path / "base")
    T5.save_pretrained(tmp_path / "base")
    cset = load_calibration(["a good film"], name="a", base=tmp_path / "base", model_config=T5)
    assert ids(cset, 0) == [6, 3, 5]
    with pytest.raises(LoraforgeError, match="(?s)no tokenizer files.*safetensors"):
        load_calibration(["a"], name="a", base=data_dir / "models" / "stories260K-llama-hf")
    with pytest.raises(LoraforgeError, match="no base folder is known"):
        load_calibration(["a"], name="a")


@pytest.mark.parametrize("config", [T5, BERT, GPT2], ids=["t5", "bert", "gpt2"])
def test_a_tokenizer_is_never_made_up(tmp_path, config) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(LoraforgeError, match="(?s)no tokenizer files.*tokenizer.json.*safetensors"):
        load_calibration(["a good film"], name="a", base=tmp_path, model_config=config)


def test_unknown_words_are_refused(tmp_path, tokenizer) -> None:
    with pytest.raises(LoraforgeError, match=r"(?s)does not know the words of this file.*10 of 11 tokens"):
        load_calibration(["x y z u v", "good x y z u v"], name="a", tokenizer=tokenizer)
    assert len(load_calibration(["x y z u v", "good good"], name="a", tokenizer=tokenizer)) == 2
    # Special tokens are no words: they do not make up for unknown ones.
    with pytest.raises(LoraforgeError, match="2 of 2 tokens"):
        load_calibration(["x [EOS] [EOS] y [PAD]"], name="a", tokenizer=tokenizer)


def test_a_base_in_memory_brings_its_folder(tmp_path, tokenizer) -> None:
    T5.save_pretrained(tmp_path)
    config = tf.AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(LoraforgeError, match="(?s)no tokenizer files.*safetensors"):
        load_calibration(["a good film"], name="a", model_config=config)
    tokenizer.save_pretrained(tmp_path)
    assert ids(load_calibration(["a good film"], name="a", model_config=config), 0) == [6, 3, 5]
    with pytest.raises(LoraforgeError, match="(?s)no base folder is known.*safetensors"):
        load_calibration(["a good film"], name="a", model_config=T5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b'{"text": "a"}\n{"text": "  "}\n', "line 2"),
        (b'{"text": "a"}\n["a"]\n', "a row must be an object"),
        (b'{"text": "a"}\n7\n', "found: int"),
        (b'{"txt": "a", "id": 3}\n', "fields txt, id"),
        (b'{"text": 3}\n', "found: int"),
        (b'{"text": "a"}\n{"text": \n', "line 2"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2"),
        (b'{"text": "a", "target": "x"}\n{"text": "b"}\n', "only some rows have a target"),
        (b'{"text": "a", "target": ""}\n', "target is not text"),
        (b'{"text": "a", "target": 1}\n', "target_map"),
    ],
)
def test_bad_rows_are_refused_by_line(tmp_path, tokenizer, content: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(LoraforgeError) as caught:
        load_calibration(path, name="a", tokenizer=tokenizer, model_config=T5)
    assert message in str(caught.value) and "bad.jsonl" in str(caught.value)


def test_json_must_be_a_list_and_many_problems_are_counted(tmp_path, tokenizer) -> None:
    path = tmp_path / "bad.json"
    path.write_text('{"text": "a"}')
    with pytest.raises(LoraforgeError, match=r"(?s)one list of objects.*\.jsonl"):
        load_calibration(path, name="a", tokenizer=tokenizer)
    path.write_text("[]")
    with pytest.raises(LoraforgeError, match="is empty"):
        load_calibration(path, name="a", tokenizer=tokenizer)
    path.write_text(json.dumps([{"text": ""}] * 30))
    with pytest.raises(InputProblems, match="(?s)row 10.*and 20 more"):
        load_calibration(path, name="a", tokenizer=tokenizer)


@pytest.mark.parametrize("template", ["no field", "{a.b}", "{a!r}", "{0:>9}", "{a", "{}"])
def test_bad_templates_are_refused(tokenizer, template: str) -> None:
    with pytest.raises(LoraforgeError, match="template"):
        load_calibration([{"a": "x"}], name="a", tokenizer=tokenizer, template=template)


def test_template_fields_must_be_there_and_text(tokenizer) -> None:
    with pytest.raises(LoraforgeError, match="(?s)no field 'goal'.*fields sol"):
        load_calibration([{"sol": "x"}], name="a", tokenizer=tokenizer, template="{goal}")
    with pytest.raises(LoraforgeError, match="(?s)not text.*list"):
        load_calibration([{"goal": []}], name="a", tokenizer=tokenizer, template="{goal}")


def test_unknown_files(tmp_path) -> None:
    (tmp_path / "a.csv").write_text("a")
    with pytest.raises(LoraforgeError, match=r"(?s)found: \.csv.*\.safetensors"):
        load_calibration(tmp_path / "a.csv", name="a")
    with pytest.raises(LoraforgeError, match="does not exist"):
        load_calibration(tmp_path / "absent.jsonl", name="a")
    with pytest.raises(LoraforgeError, match="nothing that can be read"):
        load_calibration([], name="a")
    with pytest.raises(LoraforgeError, match="nothing that can be read"):
        load_calibration(7, name="a")


def test_safetensors_inputs(tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    save_file({"input_ids": torch.tensor([[5, 6, 7, 0], [8, 0, 0, 0]]), "attention_mask": mask}, path)
    cset = load_calibration(path, name="a", model_config=BERT)
    assert ids(cset, 0) == [5, 6, 7] and ids(cset, 1) == [8] and cset.texts is None
    save_file({"input_ids": torch.tensor([[5, 6, 7, 0]])}, path)
    assert ids(load_calibration(path, name="a", model_config=BERT), 0, "attention_mask") == [1, 1, 1, 1]


def test_labels_become_decoder_inputs(tmp_path) -> None:
    tensors = {
        "input_ids": torch.tensor([[5, 6], [7, 8]]),
        "labels": torch.tensor([[9, -100, 4, 6, -100], [3, 0, 0, 0, 0]]),
    }
    cset = load_calibration(tensors, name="a", model_config=T5)
    assert ids(cset, 0, "decoder_input_ids") == [0, 9, 0, 4] and ids(cset, 0, "decoder_attention_mask") == [1, 1, 0, 1]
    assert ids(cset, 1, "decoder_input_ids") == [0]
    shifted = tf.T5ForConditionalGeneration(T5)._shift_right(torch.tensor([[9, 4, 2]]))
    full = load_calibration(
        {"input_ids": torch.tensor([[5]]), "labels": torch.tensor([[9, 4, 2]])}, name="a", model_config=T5
    )
    assert ids(full, 0, "decoder_input_ids") == shifted[0].tolist()
    with pytest.raises(LoraforgeError, match="labels hold no token"):
        load_calibration(
            {"input_ids": torch.tensor([[5]]), "labels": torch.tensor([[-100]])}, name="a", model_config=T5
        )
    classes = load_calibration(
        {"input_ids": torch.tensor([[5], [6]]), "labels": torch.tensor([1, 0])}, name="a", model_config=BERT
    )
    assert classes.labels == [1, 0] and "labels" not in classes.samples[0]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"input_ids": torch.tensor([[1, 20]])}, "outside the model's vocabulary"),
        ({"input_ids": torch.tensor([[1, 2], [-1, 2]])}, "sample 1"),
        ({"input_ids": torch.tensor([[1.0, 2.0]])}, "whole numbers"),
        ({"input_ids": torch.tensor([1, 2])}, "(samples, tokens)"),
        ({"input_ids": torch.zeros(0, 3, dtype=torch.int64)}, "no samples"),
        ({"input_ids": torch.ones(1, 9, dtype=torch.int64)}, "longer than the model has positions"),
        ({"input_ids": ONES, "attention_mask": ONES[:1]}, "number of samples"),
        ({"input_ids": ONES, "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, "sample 1"),
        ({"input_ids": ONES[:1], "attention_mask": torch.tensor([[1, 2, 1]])}, "0 and 1"),
        ({"input_ids": ONES, "attention_mask": ONES[:, :2]}, "lengths"),
        ({"inputs_embeds": torch.tensor([[[1.0, float("nan")]]])}, "not finite"),
        ({"pixel_values": torch.full((1, 3, 8, 8), float("inf"))}, "not finite"),
        ({"pixel_values": torch.ones(1, 3, 8, 8, dtype=torch.uint8)}, "floating point"),
        ({"input_ids": "text"}, "not a tensor"),
        ({}, "no tensors"),
    ],
)  # fmt: skip
def test_bad_tensors_are_refused_by_name(tensors, message: str) -> None:
    with pytest.raises(LoraforgeError) as caught:
        load_calibration(tensors, name="mine", model_config=BERT)
    assert message in str(caught.value) and "mine" in str(caught.value)


def test_damaged_safetensors(tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"input_ids": torch.ones(4, 64, dtype=torch.int64)}, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(LoraforgeError, match=r"(?s)not a whole.*a\.safetensors"):
        load_calibration(path, name="a")
    path.write_bytes(b"no header at all")
    with pytest.raises(LoraforgeError, match="not a whole"):
        load_calibration(path, name="a")


def test_samples_that_differ_are_refused() -> None:
    with pytest.raises(LoraforgeError, match="different inputs"):
        load_calibration(
            [{"input_ids": torch.ones(2, dtype=torch.int64)}, {"pixel_values": torch.ones(3, 8, 8)}], name="a"
        )
    with pytest.raises(LoraforgeError, match="differ in shape"):
        load_calibration([{"pixel_values": torch.ones(3, 8, 8)}, {"pixel_values": torch.ones(3, 8, 9)}], name="a")


def test_a_folder_of_images(tmp_path) -> None:
    for label, shade in (("dark", 0), ("light", 255)):
        (tmp_path / label).mkdir()
        Image.new("L", (20, 12), shade).save(tmp_path / label / "0.png")
    cset = load_calibration(tmp_path, name="a", model_config=VIT)
    assert [s["pixel_values"].shape for s in cset.samples] == [(3, 8, 8)] * 2
    assert [float(s["pixel_values"].mean()) for s in cset.samples] == [-1.0, 1.0] and cset.labels == ["dark", "light"]
    (tmp_path / "dark" / "0.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(LoraforgeError, match=r"(?s)cannot be read.*0\.png"):
        load_calibration(tmp_path, name="a", model_config=VIT)


def test_images_through_the_bases_processor(tmp_path) -> None:
    base, images = tmp_path / "base", tmp_path / "images"
    base.mkdir()
    images.mkdir()
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 6, "width": 6},
        "image_mean": [0.0] * 3,
        "image_std": [1.0] * 3,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
    }
    (base / "preprocessor_config.json").write_text(json.dumps(processor))
    Image.new("RGB", (9, 9), (255, 0, 0)).save(images / "a.png")
    (sample,) = load_calibration(images, name="a", base=base, model_config=VIT).samples
    assert sample["pixel_values"].shape == (3, 6, 6) and sample["pixel_values"][0].mean() == pytest.approx(1.0)
    with pytest.raises(LoraforgeError, match="no image processor"):
        load_calibration(images, name="a", model_config=BERT)
    with pytest.raises(LoraforgeError, match="holds no image"):
        load_calibration(base, name="a", model_config=VIT)


def test_rows_may_name_an_image(tmp_path, tokenizer) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    path = jsonl(tmp_path / "a.jsonl", {"image": "x.png", "text": "a film"})
    (sample,) = load_calibration(path, name="a", tokenizer=tokenizer, model_config=VIT).samples
    assert sample["pixel_values"].shape == (3, 8, 8) and sample["input_ids"].tolist() == [6, 5]
    wrong = jsonl(tmp_path / "b.jsonl", {"image": "y.png"})
    with pytest.raises(LoraforgeError, match=r"line 1, y\.png"):
        load_calibration(wrong, name="a", model_config=VIT)


def test_hub_data_sets(monkeypatch, tokenizer) -> None:
    asked = {}

    def load_dataset(name, config, *, split, download_config):
        asked.update(name=name, config=config, split=split, offline=download_config.local_files_only)
        if name == "absent":
            raise FileNotFoundError("not in the cache")
        return [{"text": "a good film"}, {"text": "bad"}]

    fake = types.ModuleType("datasets")
    fake.load_dataset, fake.DownloadConfig = load_dataset, lambda **kw: types.SimpleNamespace(**kw)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    cset = load_calibration("hf://owner/set#part:dev", name="a", tokenizer=tokenizer)
    assert len(cset) == 2 and asked == {"name": "owner/set", "config": "part", "split": "dev", "offline": True}
    load_calibration("hf://set", name="a", tokenizer=tokenizer)
    assert asked["split"] == "train" and asked["config"] is None
    with pytest.raises(LoraforgeError, match="(?s)cannot be loaded.*LORAFORGE_ALLOW_DOWNLOAD"):
        load_calibration("hf://absent", name="a", tokenizer=tokenizer)
    with pytest.raises(LoraforgeError, match="not the address"):
        load_calibration("hf://", name="a", tokenizer=tokenizer)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(LoraforgeError, match=r"pip install 'loraforge\[data\]'"):
        load_calibration("hf://set", name="a", tokenizer=tokenizer)


def test_fingerprints_follow_the_content(tmp_path, tokenizer) -> None:
    one = jsonl(tmp_path / "a.jsonl", {"text": "a"})
    two = jsonl(tmp_path / "b.jsonl", {"text": "bad"})
    hashes = [load_calibration(p, name="a", tokenizer=tokenizer).sha256 for p in (one, one, two)]
    assert hashes[0] == hashes[1] != hashes[2]
    memory = [load_calibration({"input_ids": torch.tensor([[v]])}, name="a").sha256 for v in (1, 1, 2)]
    assert memory[0] == memory[1] != memory[2]
