"""Greedy answers against a loop of one token at a time, whatever the batch and the model's own settings."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from loraforge.errors import LoraforgeError
from loraforge.evaluation.generation import generate
from loraforge.evaluation.score import score_task
from loraforge.tasks import TaskSpec, load_model, load_task
from tests.tasks.tiny import EOS, POSITIONS, tiny_base, write_rows

ROWS = [
    {"text": "red", "target": "sun"},
    {"text": "one two three four up down", "target": "cat dog"},
    {"text": "yes no", "target": "is the"},
    {"text": "sun moon cat dog", "target": "up"},
    {"text": "good", "target": "fine poor"},
]
NEW = 6


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Base, tokenizer, model and data of each family."""
    folder = tmp_path_factory.mktemp("generation")
    path = write_rows(folder / "rows.jsonl", ROWS)
    found = {}
    for family in ("gpt2", "llama", "qwen3", "t5"):
        kind = "text-to-text" if family == "t5" else "causal"
        base = tiny_base(folder / family, family, seed=3)
        tokenizer = AutoTokenizer.from_pretrained(base)
        data = load_task(TaskSpec(id="g", test=str(path), kind=kind), "test", base=base)
        model = load_model(base, kind)[0]
        if family == "t5":
            # As it is drawn it answers every prompt with nothing.
            draw = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_(generator=draw)
        found[family] = (model, tokenizer, data)
    return found


def greedy(model, prompt):
    """The tokens behind one prompt, by whole forwards, up to the end token."""
    ids, found = prompt["input_ids"][None], []
    decoder = torch.tensor([[model.config.decoder_start_token_id or 0]]) if model.config.is_encoder_decoder else None
    for _ in range(NEW):
        with torch.no_grad():
            if decoder is None:
                logits = model(input_ids=torch.cat([ids, torch.tensor([found], dtype=torch.long)], dim=1)).logits
            else:
                logits = model(input_ids=ids, decoder_input_ids=decoder).logits
        token = int(logits[0, -1].argmax())
        if token == EOS:
            break
        found.append(token)
        if decoder is not None:
            decoder = torch.cat([decoder, torch.tensor([[token]])], dim=1)
    return found


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "t5"])
@pytest.mark.parametrize("batch_tokens", [1, 10_000])
def test_answers_are_the_greedy_ones_of_each_prompt_alone(made, family, batch_tokens):
    model, tokenizer, data = made[family]
    prompts = data.prompts or data.examples
    expected = [tokenizer.decode(greedy(model, p), skip_special_tokens=True).strip() for p in prompts]
    found = generate(model, prompts, tokenizer, max_new_tokens=NEW, batch_tokens=batch_tokens)
    assert found == expected
    assert len(set(found)) > 1


def test_the_models_own_generation_settings_do_not_count_and_stay(made):
    model, tokenizer, data = made["qwen3"]
    plain = generate(model, data.prompts, tokenizer, max_new_tokens=NEW, batch_tokens=100)
    settings = {"do_sample": True, "temperature": 0.6, "top_k": 3, "repetition_penalty": 50.0, "min_length": 40}
    model.generation_config.update(**settings)
    try:
        assert generate(model, data.prompts, tokenizer, max_new_tokens=NEW, batch_tokens=100) == plain
        assert model.generation_config.temperature == 0.6 and model.generation_config.do_sample
    finally:
        model.generation_config.update(
            do_sample=False, temperature=None, top_k=None, repetition_penalty=None, min_length=None
        )


def test_an_end_token_cuts_the_answer(made):
    """A model that must end at once answers nothing."""
    model, tokenizer, data = made["gpt2"]
    first = {row: greedy(model, prompt)[:1] for row, prompt in enumerate(data.prompts)}
    token = next(tokens[0] for tokens in first.values() if tokens)
    model.generation_config.eos_token_id = [EOS, token]
    try:
        found = generate(model, data.prompts, tokenizer, max_new_tokens=NEW, batch_tokens=1000)
    finally:
        model.generation_config.eos_token_id = EOS
    for row, tokens in first.items():
        assert (found[row] == "") == (tokens in ([], [token]))


def test_a_task_is_scored_on_what_was_generated(made):
    model, tokenizer, data = made["llama"]
    answers = generate(model, data.prompts, tokenizer, max_new_tokens=NEW, batch_tokens=100)
    data.references[0], data.references[3] = answers[0], answers[3]
    score = score_task(model, data, tokenizer=tokenizer, max_new_tokens=NEW, metrics=["exact_match", "rouge1"])
    right = [float(a == b) for a, b in zip(answers, data.references, strict=True)]
    assert score.predictions == answers
    assert score.outcomes == right and right[0] == right[3] == 1.0
    assert score.metrics["exact_match"] == pytest.approx(sum(right) / 5)
    assert score.metrics["rouge1"] >= score.metrics["exact_match"] - 1e-12


def test_captions_equal_those_of_each_image_alone(tmp_path):
    from PIL import Image

    base = tiny_base(tmp_path / "blip", "blip", seed=1)
    draw = torch.Generator().manual_seed(0)
    rows = []
    for i in range(3):
        pixels = torch.randint(0, 256, (8, 8, 3), generator=draw, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "target": "red sun"})
    data = load_task(TaskSpec(id="cap", test=str(write_rows(tmp_path / "c.jsonl", rows))), "test", base=base)
    model, tokenizer = load_model(base, "causal")[0], AutoTokenizer.from_pretrained(base)
    together = generate(model, data.prompts, tokenizer, max_new_tokens=4, batch_tokens=1000)
    for i in range(3):
        pixels = data.prompts[i]["pixel_values"][None]
        alone = model.generate(pixel_values=pixels, do_sample=False, num_beams=1, max_new_tokens=4)
        assert together[i] == tokenizer.decode(alone[0], skip_special_tokens=True).strip()
    assert score_task(model, data, metrics="perplexity").value > 1


def test_a_model_without_a_language_head_cannot_generate(tmp_path):
    base = tiny_base(tmp_path / "bert", "bert")
    model = load_model(base, "classification", head_labels=("a", "b"))[0]
    prompt = {"input_ids": torch.tensor([6]), "attention_mask": torch.tensor([1])}
    with pytest.raises(LoraforgeError, match="cannot generate"):
        generate(model, [prompt], AutoTokenizer.from_pretrained(base), max_new_tokens=2, batch_tokens=10)


def test_no_room_for_an_answer_is_refused(made):
    model, tokenizer, data = made["gpt2"]
    with pytest.raises(LoraforgeError, match="longer than the model's positions"):
        generate(model, data.prompts, tokenizer, max_new_tokens=POSITIONS, batch_tokens=100)


def test_generation_needs_a_tokenizer(made):
    model, _, data = made["gpt2"]
    with pytest.raises(LoraforgeError, match="needs a tokenizer"):
        score_task(model, data)
