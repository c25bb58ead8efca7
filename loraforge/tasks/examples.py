"""The rows of a split into the examples of its kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loraforge.calibrate.checks import text_config
from loraforge.calibrate.encode import load_tokenizer
from loraforge.calibrate.images import load_image_processor
from loraforge.errors import LoraforgeError
from loraforge.tasks.encode import Example, Reading, encode_answers, encode_continuations, encode_texts
from loraforge.tasks.fields import answer_of, choices_of, has_field, image_field, target_of, text_of
from loraforge.tasks.labels import class_of, head_positions, known_values, own_names
from loraforge.tasks.pictures import Pixels
from loraforge.tasks.rows import Rows, T
from loraforge.tasks.spec import TaskSpec


@dataclass(slots=True, eq=False)
class Job:
    """The rows that were taken, and what they are read with."""

    spec: TaskSpec
    kind: str
    rows: Rows
    chosen: list[int]
    tokenizer: Any
    config: Any
    processor: Any
    base: object

    @property
    def names(self) -> list[str]:
        """What to call the rows taken."""
        return [self.rows.names[i] for i in self.chosen]

    def each(self, make: Callable[[Mapping[str, Any], str], T]) -> list[T]:
        """What `make(item, where)` gives for every row taken; the problems of all rows at once."""
        return self.rows.each(make, self.chosen)

    def reading(self) -> Reading:
        """How their texts become tokens.

        Raises:
            LoraforgeError: The base has no tokenizer.
        """
        if self.tokenizer is None:
            hint = "copy the tokenizer's files into the folder of the base"
            self.tokenizer = load_tokenizer(self.base, f"task '{self.spec.id}'", hint)
        spec = self.spec
        return Reading(self.tokenizer, self.config, spec.max_length, spec.max_target_length, self.rows.where)


@dataclass(slots=True, eq=False)
class Parts:
    """What a kind makes of the rows; the images are put beside the tensors of examples and prompts."""

    examples: list[Example]
    references: list[Any]
    texts: list[str] | None = None
    choices: list[list[Example]] | None = None
    prompts: list[Example] | None = None
    pixels: Pixels | None = None
    labels: tuple[str, ...] = ()
    label_ids: tuple[int, ...] = ()


def make_examples(job: Job, head_labels: Sequence[str] | None, label_space: str) -> Parts:
    """The examples of the rows that were taken.

    Args:
        job: The rows and what they are read with.
        head_labels: Names of all rows of the head; None for the task's own.
        label_space: How the head names classes.

    Raises:
        LoraforgeError: Rows that cannot be used, each named.
    """
    if job.kind in ("classification", "images"):
        return _classified(job, head_labels, label_space)
    return _chosen(job) if job.kind == "choice" else _answered(job)


def _classified(job: Job, head_labels: Sequence[str] | None, label_space: str) -> Parts:
    spec = job.spec
    names = own_names(spec, head_labels, label_space)
    positions = head_positions(spec, names, head_labels, label_space)
    known = known_values(spec, names)

    def read(item: Mapping[str, Any], where: str) -> tuple[int, str, str]:
        first = "" if job.kind == "images" else text_of(item, spec.text or "text", where, "text")
        second = "" if spec.text_pair is None else text_of(item, spec.text_pair, where, "text_pair")
        return positions[class_of(item, spec, where, known)], first, second

    found = job.each(read)
    texts = [first for _, first, _ in found]
    if job.kind == "images":
        fields: list[Example] = [{} for _ in found]
    else:
        pairs = None if spec.text_pair is None else [second for _, _, second in found]
        fields = encode_texts(texts, pairs, job.reading(), job.names)
    references = [position for position, _, _ in found]
    for example, position in zip(fields, references, strict=True):
        example["labels"] = torch.tensor(position)
    if job.kind == "images":
        return Parts(fields, references, pixels=_pixels(job), labels=names, label_ids=positions)
    return Parts(fields, references, texts, labels=names, label_ids=positions)


def _answered(job: Job) -> Parts:
    """Causal, captions and text-to-text: a prompt and its answer."""
    spec, first = job.spec, job.rows.items[0]
    causal = job.kind == "causal"
    captions = causal and image_field(first) is not None
    bare = spec.target is None and not has_field(first, "target")
    # Plain text, or a caption under the name of a text: nothing is asked.
    plain = causal and bare and (captions or spec.loss_on == "all")
    asks = spec.text is not None or not captions or (has_field(first, "text") and spec.target != "text")

    def read(item: Mapping[str, Any], where: str) -> tuple[str, str]:
        if plain:
            return "", text_of(item, spec.text or "text", where, "text")
        prompt = text_of(item, spec.text or "text", where, "text", empty=causal) if asks else ""
        return prompt, target_of(item, spec, where)

    found = job.each(read)
    prompts, answers = [prompt for prompt, _ in found], [answer for _, answer in found]
    if not causal:
        return Parts(encode_answers(prompts, answers, job.reading(), job.names), answers, prompts)
    start = text_config(job.config, "bos_token_id") if captions else None
    examples, asked = encode_continuations(prompts, answers, job.reading(), job.names, spec.loss_on, start=start)
    texts = prompts if any(prompts) else answers
    if not captions:
        return Parts(examples, answers, texts, prompts=asked)
    asked = asked if any(prompts) else [{} for _ in asked]
    return Parts(examples, answers, texts, prompts=asked, pixels=_pixels(job))


def _chosen(job: Job) -> Parts:
    """Choice: every choice as an answer to the same prompt, and the right one as the example to learn."""
    spec, reading = job.spec, job.reading()

    def read(item: Mapping[str, Any], where: str) -> tuple[str, list[str], int]:
        texts = choices_of(item, spec, where)
        return text_of(item, spec.text or "text", where, "text"), texts, answer_of(item, texts, spec, where)

    found = job.each(read)
    prompts, choices = [prompt for prompt, _, _ in found], [texts for _, texts, _ in found]
    right = [texts[index] for _, texts, index in found]
    counts = [len(texts) for texts in choices]
    every = [prompt for prompt, count in zip(prompts, counts, strict=True) for _ in range(count)]
    flat = [text for texts in choices for text in texts]
    names = [f"{name}, choice {i + 1}" for name, count in zip(job.names, counts, strict=True) for i in range(count)]
    if getattr(job.config, "is_encoder_decoder", False):
        examples = encode_answers(prompts, right, reading, job.names)
        options = encode_answers(every, flat, reading, names)
    else:
        examples, _ = encode_continuations(prompts, right, reading, job.names, spec.loss_on)
        options, _ = encode_continuations(every, flat, reading, names, "target", end=False)
    rest = iter(options)
    options_of = [[next(rest) for _ in range(count)] for count in counts]
    return Parts(examples, [index for _, _, index in found], prompts, choices=options_of)


def _pixels(job: Job) -> Pixels:
    """The image of every row."""
    if job.processor is None:
        job.processor = load_image_processor(job.base)
    fields = job.each(_image)
    folder = job.rows.folder or Path()
    images = [folder / image if isinstance(image, str) else image for image in fields]
    return Pixels(images, job.processor, job.config, [job.rows.place(i) for i in job.chosen])


def _image(item: Mapping[str, Any], where: str) -> Any:
    """A path, the bytes of a file, or a picture in memory."""
    name = image_field(item)
    if name is None:
        got = f"fields {', '.join(map(str, item))}"
        raise LoraforgeError("the row has no image", where=where, got=got, expected="a field 'image'")
    value = item[name]
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str | bytes) or hasattr(value, "convert"):
        return value
    got, expected = type(value).__name__, "a path, the bytes of a file, or a picture of Pillow"
    raise LoraforgeError("the image of the row cannot be used", where=f"{where}, {name}", got=got, expected=expected)
