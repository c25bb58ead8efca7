"""Splits of tasks as examples, through real (tiny) bases."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch.nn.functional import log_softmax

from loraforge.errors import InputProblems, LoraforgeError
from loraforge.tasks import Collator, TaskSpec, load_model, load_task, pad_token_id_of
from tests.tasks.tiny import BOS, EOS, SEP, WORDS, tiny_base, write_rows

CLASSES = [
    {"text": "good cat", "label": "b"},
    {"text": "bad dog sun moon", "label": "a"},
    {"text": "red", "label": "b"},
]
ASKED = [{"text": "is the cat", "target": "yes"}, {"text": "is dog red blue", "target": "no one two"}]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    made = {}

    def base(family):
        if family not in made:
            made[family] = tiny_base(folder / family, family)
        return made[family]

    return base


def ids(*words):
    return [WORDS.index(word) + 6 for word in words]


def loss_of(model, config, data, examples, side="right"):
    batch = Collator(data.kind, pad_token_id_of(None, config), side)(examples)
    batch.pop("task")
    with torch.no_grad():
        return model(**batch).loss


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2", "gpt2", "llama"])
def test_classification_batches_equal_single_rows(bases, family):
    data = load_task(TaskSpec("t", train=CLASSES), "train", base=bases(family))
    assert (data.kind, data.labels, data.label_ids, data.references) == (
        "classification",
        ("a", "b"),
        (0, 1),
        [1, 0, 1],
    )
    assert data.texts == [row["text"] for row in CLASSES] and data.available == len(data) == 3
    model, config, _ = load_model(bases(family), data.kind, head_labels=data.labels)
    alone = torch.stack([loss_of(model, config, data, [example]) for example in data.examples])
    torch.testing.assert_close(loss_of(model, config, data, data.examples), alone.mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_causal_loss_is_the_answers_alone(bases, family, side):
    data = load_task(TaskSpec("t", train=ASKED), "train", base=bases(family))
    model, config, fresh = load_model(bases(family), data.kind)
    assert fresh == () and data.references == ["yes", "no one two"]
    total, count = 0.0, 0
    for example, prompt, words in zip(data.examples, data.prompts, (["yes"], ["no", "one", "two"]), strict=True):
        answer = [*ids(*words), EOS]
        assert example["input_ids"].tolist() == prompt["input_ids"].tolist() + answer
        with torch.no_grad():
            scores = log_softmax(model(input_ids=example["input_ids"][None]).logits[0].double(), -1)
        start = len(prompt["input_ids"]) - 1
        total -= sum(float(scores[start + i, token]) for i, token in enumerate(answer))
        count += len(answer)
    batch = Collator("causal", pad_token_id_of(None, config), side)(data.examples)
    batch.pop("task")
    if side == "left" and family == "gpt2":
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        assert float(model(**batch).loss) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_text_to_text(bases, family):
    data = load_task(TaskSpec("t", train=ASKED), "train", base=bases(family))
    front = [BOS] if family == "bart" else []
    assert data.kind == "text-to-text" and data.prompts is None
    assert data.examples[1]["input_ids"].tolist() == [*front, *ids("is", "dog", "red", "blue"), EOS]
    assert data.examples[1]["labels"].tolist() == [*front, *ids("no", "one", "two"), EOS]
    model, config, _ = load_model(bases(family), data.kind)
    both = loss_of(model, config, data, data.examples)
    sizes = [len(example["labels"]) for example in data.examples]
    alone = [loss_of(model, config, data, [example]) * size for example, size in zip(data.examples, sizes, strict=True)]
    torch.testing.assert_close(both, sum(alone) / sum(sizes), rtol=1e-5, atol=1e-6)


def test_plain_text_is_learnt_from_its_first_token(bases):
    data = load_task(TaskSpec("t", train=[{"text": "good cat"}], loss_on="all"), "train", base=bases("qwen3"))
    assert data.examples[0]["labels"].tolist() == [*ids("good", "cat"), EOS] == data.examples[0]["input_ids"].tolist()
    assert data.texts == data.references == ["good cat"]


def test_choices(bases):
    rows = [
        {"q": "is the cat", "c": ["good", "bad dog"], "answer": "2"},
        {"q": "red", "c": ["one", "two", "three"], "answer": "A"},
    ]
    spec = TaskSpec("t", train=rows, text="q", choices="c")
    data = load_task(spec, "train", base=bases("llama"))
    assert (data.kind, data.references) == ("choice", [1, 0])
    asked = [BOS, *ids("is", "the", "cat")]
    assert [choice["input_ids"].tolist() for choice in data.choices[0]] == [
        [*asked, *ids("good")],
        [*asked, *ids("bad", "dog")],
    ]
    assert data.choices[0][1]["labels"].tolist() == [-100] * 4 + ids("bad", "dog")
    assert data.examples[0]["input_ids"].tolist() == [*asked, *ids("bad", "dog"), EOS]
    assert [len(choices) for choices in data.choices] == [2, 3]
    decoded = load_task(spec, "train", base=bases("t5"))
    assert decoded.choices[1][2]["labels"].tolist() == [*ids("three"), EOS]


def images(folder):
    for name, shade in (("x/0", 0), ("x/1", 255), ("y/0", 100)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 7), (shade,) * 3).save(folder / f"{name}.png")
    return folder


def test_images(bases, tmp_path):
    data = load_task(TaskSpec("t", train=images(tmp_path)), "train", base=bases("vit"))
    assert (data.kind, data.labels, data.references, data.texts) == ("images", ("x", "y"), [0, 0, 1], None)
    # The processor's mean and deviation are 0.5.
    shades = [float(example["pixel_values"].mean()) for example in data.examples]
    assert shades == pytest.approx([-1, 1, 100 / 127.5 - 1], abs=1e-6)
    model, config, fresh = load_model(bases("vit"), data.kind, head_labels=data.labels)
    assert fresh == ("classifier",) and torch.isfinite(loss_of(model, config, data, data.examples))


def test_images_of_rows_in_memory_and_in_bytes(bases, tmp_path):
    folder = images(tmp_path)
    rows = [
        {"image": Image.open(folder / "x/0.png"), "label": "x"},
        {"image": {"bytes": (folder / "y/0.png").read_bytes(), "path": None}, "label": "y"},
        {"image": str(folder / "x/1.png"), "label": "x"},
    ]
    data = load_task(TaskSpec("t", train=rows), "train", base=bases("vit"))
    shades = [float(example["pixel_values"].mean()) for example in data.examples]
    assert shades == pytest.approx([-1, 100 / 127.5 - 1, 1], abs=1e-6)


def test_images_beyond_what_is_kept_are_decoded_when_asked_for(bases, tmp_path, monkeypatch):
    folder = images(tmp_path)
    spec = TaskSpec("t", train=folder)
    whole = load_task(spec, "train", base=bases("vit"))
    one = whole.examples[0]["pixel_values"].nbytes
    monkeypatch.setattr("loraforge.tasks.pictures.KEPT_BYTES", one)
    lazy = load_task(spec, "train", base=bases("vit"))
    for kept, decoded in zip(whole.examples, lazy.examples, strict=True):
        assert kept.keys() == decoded.keys() and all(torch.equal(kept[key], decoded[key]) for key in kept)
    assert lazy.examples[2]["pixel_values"] is not lazy.examples[-1]["pixel_values"]
    assert lazy.examples[0]["pixel_values"] is lazy.examples[-3]["pixel_values"]
    assert [int(example["labels"]) for example in lazy.examples[1:]] == [0, 1]
    with pytest.raises(IndexError):
        lazy.examples[3]
    (folder / "y/0.png").unlink()
    with pytest.raises(LoraforgeError, match=r"image cannot be read(.|\n)*y/0\.png"):
        lazy.examples[2]


@pytest.mark.parametrize("field", ["text", "target"])
def test_captions(bases, tmp_path, field):
    rows = [{"image": f"{name}.png", field: caption} for name, caption in (("x/0", "good cat"), ("y/0", "red"))]
    path = write_rows(images(tmp_path) / "rows.jsonl", rows)
    data = load_task(TaskSpec("t", train=path), "train", base=bases("blip"))
    example = data.examples[0]
    assert data.kind == "causal" and set(data.prompts[0]) == {"pixel_values"}
    assert example["input_ids"].tolist() == [BOS, *ids("good", "cat"), SEP]
    assert example["labels"].tolist() == [-100, *ids("good", "cat"), SEP]
    assert data.references == ["good cat", "red"]
    model, config, _ = load_model(bases("blip"), data.kind)
    both = loss_of(model, config, data, data.examples)
    sizes = [int((e["labels"] != -100).sum()) for e in data.examples]
    alone = [loss_of(model, config, data, [e]) * size for e, size in zip(data.examples, sizes, strict=True)]
    torch.testing.assert_close(both, sum(alone) / sum(sizes), rtol=1e-5, atol=1e-6)


def test_captions_with_a_prompt(bases, tmp_path):
    path = write_rows(images(tmp_path) / "rows.jsonl", [{"image": "x/0.png", "text": "is the", "target": "cat"}])
    data = load_task(TaskSpec("t", train=path), "train", base=bases("blip"))
    assert data.prompts[0]["input_ids"].tolist() == [BOS, *ids("is", "the")]
    assert data.examples[0]["labels"].tolist() == [-100] * 3 + [*ids("cat"), SEP]


def test_rows_are_drawn_by_the_seed(bases):
    rows = [{"text": word, "label": i % 2} for i, word in enumerate(WORDS[:12])]
    spec = TaskSpec("t", train=rows, test=rows, rows=5)

    def texts(split, **keys):
        return load_task(spec, split, base=bases("bert"), **keys).texts

    first = texts("train", seed=1)
    assert len(first) == 5 and first == texts("train", seed=1) != texts("train", seed=2)
    assert first == sorted(first, key=WORDS.index)
    assert set(texts("train", seed=1, limit=3)) < set(first)
    assert len(texts("test")) == 12 and len(texts("test", limit=4)) == 4
    assert load_task(spec, "train", base=bases("bert")).available == 12


def test_a_field_may_be_extracted_from_itself(bases):
    rows = [{"text": f"Sort: {row['text']}?", "label": row["label"]} for row in CLASSES]
    spec = TaskSpec("t", train=rows, extract={"text": {"field": "text", "pattern": r"Sort: (.*)\?"}})
    assert load_task(spec, "train", base=bases("bert")).texts == [row["text"] for row in CLASSES]
    with pytest.raises(InputProblems, match="2 problems"):
        load_task(TaskSpec("t", train=[*rows, *CLASSES[:2]], extract=spec.extract), "train", base=bases("bert"))


def test_a_shared_head(bases):
    spec = TaskSpec("b", train=CLASSES)
    head = ("a:a", "a:b", "b:a", "b:b")
    data = load_task(spec, "train", base=bases("bert"), head_labels=head, label_space="per-task", task_index=4)
    assert (data.labels, data.label_ids, data.references) == (("a", "b"), (2, 3), [3, 2, 3])
    assert [int(e["labels"]) for e in data.examples] == [3, 2, 3]
    assert {int(e["task"]) for e in data.examples} == {4}


def test_bad_texts_and_bad_labels_at_once(bases):
    rows = [{"text": "good", "label": "c"}, {"text": "", "label": "a"}, {"text": "bad"}]
    with pytest.raises(InputProblems) as caught:
        load_task(TaskSpec("t", train=CLASSES, test=rows), "test", base=bases("bert"))
    assert [problem.what.split(":")[0] for problem in caught.value.problems] == [
        "unknown label",
        "the text is empty",
        "the row has no field 'label'",
    ]


def test_all_bad_rows_at_once(bases, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "good"}, {"text": ""}, {"words": "x"}, {"text": "bad"}])
    spec = TaskSpec("t", train=[{"text": "a", "label": 1}, {"text": "b", "label": 2}], test=path, target="text")
    with pytest.raises(InputProblems) as caught:
        load_task(spec, "test", base=bases("llama"))
    message = str(caught.value)
    assert f"{path}, line 2, text" in message and f"{path}, line 3" in message and "line 4" not in message


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"train": CLASSES}, "has no 'test' rows"),
        ({"train": CLASSES, "test": []}, "'test' split of the task is empty"),
        ({"train": CLASSES, "test": [{"text": "good", "label": "c"}]}, "unknown label(.|\n)*row 1, label(.|\n)*'c'"),
        ({"train": CLASSES, "test": [{"txt": "good", "label": "a"}]}, "no field 'text'(.|\n)*row 1"),
        ({"train": CLASSES, "test": [{"text": "zzz yyy", "label": "a"}]}, "does not know the words"),
        ({"train": CLASSES, "test": [{"text": "good", "label": "a"}], "text_pair": "b"}, "no field 'b'"),
    ],
)
def test_mistakes(bases, keys, message):
    with pytest.raises(LoraforgeError, match=message):
        load_task(TaskSpec("t", **keys), "test", base=bases("bert"))


def test_more_mistakes(bases, tmp_path):
    with pytest.raises(LoraforgeError, match="unknown split"):
        load_task(TaskSpec("t", train=CLASSES), "dev", base=bases("bert"))
    with pytest.raises(LoraforgeError, match="no base folder is known"):
        load_task(TaskSpec("t", train=CLASSES), "train")
    path = write_rows(images(tmp_path) / "rows.jsonl", [{"image": "x/9.png", "text": "cat"}])
    with pytest.raises(LoraforgeError, match="image cannot be read(.|\n)*line 1"):
        load_task(TaskSpec("t", train=path), "train", base=bases("blip"))
    with pytest.raises(LoraforgeError, match=r"cannot be used(.|\n)*row 1, row 2, image(.|\n)*int"):
        load_task(TaskSpec("t", train=[{"image": 3, "label": c} for c in "ab"]), "train", base=bases("vit"))
    with pytest.raises(LoraforgeError, match="no image(.|\n)*row 1"):
        load_task(TaskSpec("t", train=CLASSES, kind="images"), "train", base=bases("vit"))
