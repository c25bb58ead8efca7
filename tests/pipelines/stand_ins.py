"""Stand-ins for what the presets read: a tiny base of the same family, and rows of the same shape in the same places.

Where `loraforge download` would put a data set of the hub, there these rows lie; so a run needs only another base,
another data folder and smaller numbers.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from loraforge.pipelines import open_pipeline
from tests.tasks.tiny import tiny_base, write_rows

Rows = list[dict[str, Any]]
WORDS = "sun moon cat dog red blue up down one two three four".split()
# Settings that make any of the presets small.
SIZES: dict[str, Any] = {
    "train.max_steps": 2,
    "train.per_device_train_batch_size": 4,
    "train.gradient_accumulation_steps": 1,
    "train.warmup_steps": 0,
    "train.learning_rate": 1e-2,
    "lora.r": 2,
}
IMAGES = {
    "cars": "tanganke/stanford_cars/default", "dtd": "tanganke/dtd/default", "eurosat": "tanganke/eurosat/default",
    "gtsrb": "tanganke/gtsrb/default", "mnist": "ylecun/mnist/default", "resisc45": "tanganke/resisc45/default",
    "sun397": "tanganke/sun397/default", "svhn": "ufldl-stanford/svhn/cropped_digits",
}  # fmt: skip


def stand_in(preset: str, folder: Path, *, hidden: int = 8, layers: int = 1) -> tuple[Path, dict[str, Any]]:
    """The data folder and the settings with which a preset runs on its stand-in; the base's size."""
    data = folder / "data"
    family, make, sizes = STAND_INS[preset]
    make(data, random.Random(0))
    base = folder / f"tiny-{family}"
    tiny_base(base, family, vocab_words=_words(preset, data), hidden=hidden, layers=layers)
    short = {f"tasks.{task.id}.max_new_tokens": 3 for task in open_pipeline(preset).tasks}
    return data, SIZES | sizes | short | {"base": str(base)}


def _glue(data: Path, draw: random.Random, tasks: Mapping[str, Sequence[str]], tests: Mapping[str, str]) -> None:
    for task, fields in tasks.items():
        classes = 3 if task == "mnli" else 2
        for split, count in (("train", 8), (tests[task], 6)):
            rows = [{**{f: _text(draw) for f in fields}, "label": i % classes, "idx": i} for i in range(count)]
            write_rows(data / "hub/nyu-mll/glue" / task / f"{split}.jsonl", rows)


def _glue_t5(data: Path, draw: random.Random) -> None:
    fields = {"mnli": ("premise", "hypothesis"), "cola": ("sentence",)}
    _glue(data, draw, fields, {"mnli": "validation_matched", "cola": "validation"})


def _glue_bart(data: Path, draw: random.Random) -> None:
    fields = {"qqp": ("question1", "question2"), "mrpc": ("sentence1", "sentence2")}
    _glue(data, draw, fields, {"qqp": "validation", "mrpc": "test"})


def _glue_pairs(data: Path, draw: random.Random) -> None:
    fields = {"rte": ("sentence1", "sentence2"), "mnli": ("premise", "hypothesis")}
    _glue(data, draw, fields, {"rte": "validation", "mnli": "validation_matched"})


def _emotion(data: Path, draw: random.Random) -> None:
    labels = ("joy", "fear", "anger")
    prompt = "Classify the sentiment of the following text into one of these categories:joy,fear,anger:"
    for task in ("emoint", "emotion-cause", "tec", "isear"):
        for split, count in (("train", 12), ("test", 6)):
            rows = [
                {"instruction": f"{prompt}{_text(draw)}?", "input": "", "output": labels[i % 3]} for i in range(count)
            ]
            write_rows(data / "data/Emotion_v2.5" / task / f"{split}.json", rows)


def _captions(data: Path, draw: random.Random) -> None:
    folder = data / "data/SENTICAP"
    for mood in ("positive", "negative"):
        for split, count in (("", 6), (".test", 4)):
            rows = []
            for i in range(count):
                name = f"val2014/{mood}{split}{i}.png"
                _image(folder / name, draw)
                rows.append({"image": name, "text": f"{mood} {_text(draw)}"})
            write_rows(folder / f"{mood}{split}.jsonl", rows)


def _common_sense(data: Path, draw: random.Random) -> None:
    for split, count in (("train", 8), ("validation", 6)):
        rows = [{"goal": _text(draw), "sol1": _text(draw), "sol2": _text(draw), "label": i % 2} for i in range(count)]
        write_rows(data / "hub/ybisk/piqa/default" / f"{split}.jsonl", rows)
        names = ("context", "question", "answerA", "answerB", "answerC")
        rows = [{**{name: _text(draw) for name in names}, "label": str(1 + i % 3)} for i in range(count)]
        write_rows(data / "hub/allenai/social_i_qa/default" / f"{split}.jsonl", rows)


def _pictures(data: Path, draw: random.Random) -> None:
    for i, name in enumerate(IMAGES.values()):
        for split, count in (("train", 3), ("test", 2)):
            # Tasks have different numbers of classes, so their heads do not fit each other.
            for label in range(2 + i % 2):
                for number in range(count):
                    _image(data / "hub" / name / split / f"class{label}" / f"{number}.png", draw)


STAND_INS: dict[str, tuple[str, Callable[[Path, random.Random], None], dict[str, Any]]] = {
    "GLUE_t5": ("t5", _glue_t5, {"params.samples_num": 6, "params.max_iter": 2}),
    "GLUE_bart": ("bart", _glue_bart, {"params.samples_num": 6, "params.max_iter": 2}),
    "EMOTION_t5_large": (
        "t5", _emotion, {"params.samples_num": 6, "params.inner_num": 2, "params.outer_num": 3, "params.max_iter": 2}
    ),
    "TASKS_blip_base": ("blip", _captions, {"params.samples_num": 4, "params.max_iter": 2}),
    "PIQA_SIQA_qwen3": ("qwen3", _common_sense, {}),
    "VIT_B_16_8": ("vit", _pictures, {}),
    "FFT_VS_LORA": (
        "deberta-v2", _glue_pairs,
        {"seeds": [1, 2], "full.learning_rate": 1e-2, "lora_train.learning_rate": 3e-2, "measure.topk": 2},
    ),
}  # fmt: skip


def _text(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=4))


def _image(path: Path, draw: random.Random) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes("RGB", (8, 8), bytes(draw.randrange(256) for _ in range(192))).save(path)


def _words(preset: str, data: Path) -> list[str]:
    """The words of the rows, of the preset's templates and of its answers."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(data.rglob("*.json*"))]
    texts += [str((task.text, task.target_map)) for task in open_pipeline(preset).tasks]
    return list(dict.fromkeys(re.findall(r"\w+|[^\w\s]+", " ".join(texts).replace("\\n", " ")))) + WORDS
