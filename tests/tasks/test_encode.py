"""Prompts and answers as tokens: joined, masked, cut."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from loraforge.errors import LoraforgeError
from loraforge.tasks.encode import Reading, encode_answers, encode_continuations, encode_texts, pad_token_id_of
from tests.tasks.tiny import BOS, CLS, EOS, PAD, SEP, WORDS, tiny_tokenizer


def byte_level():
    """Every byte one token, so that spaces show; without special tokens but an end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(["<end>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def sentence_piece():
    """A space before every text, as SentencePiece puts one."""
    alphabet = ["<end>", "\u2581", *"abcdefghijklmnopqrstuvwxyz:?\n"]
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def reading(tokenizer, limit=None, targets=None, config=None):
    return Reading(tokenizer, config, limit, targets, "file")


def ids(*words):
    return [WORDS.index(word) + 6 for word in words]


def one(prompt, answer, how, **keys):
    examples, prompts = encode_continuations([prompt], [answer], how, ["line 1"], **keys)
    return {key: value.tolist() for key, value in examples[0].items()}, prompts[0]["input_ids"].tolist()


@pytest.mark.parametrize(
    ("prompt", "answer", "text"),
    [
        ("is it?", "yes", "is it? yes"),
        ("is it? ", "yes", "is it? yes"),
        ("is it?  ", "yes", "is it? yes"),
        ("is it?", " yes", "is it? yes"),
        ("is it?\n", "yes", "is it?\nyes"),
        ("", "yes", "yes"),
    ],
)
@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_the_space_between_belongs_to_the_answer(make, prompt, answer, text):
    if make is sentence_piece and "\n" in prompt:
        text = text.replace("\n", "\n ")  # such a tokenizer begins every text with a space
    tokenizer = make()
    example, asked = one(prompt, answer, reading(tokenizer), end=False)
    assert tokenizer.decode(example["input_ids"]) == text
    assert tokenizer.decode(asked) == prompt.rstrip(" ")
    # The joined tokens are those of the text as a whole.
    if "\n" not in prompt or make is byte_level:
        assert example["input_ids"] == tokenizer(text)["input_ids"]
    start = len(asked)
    assert example["labels"] == [-100] * start + example["input_ids"][start:]


def test_causal_examples_by_hand():
    example, asked = one("is the cat", "good", reading(tiny_tokenizer(WORDS, "llama")))
    assert example["input_ids"] == [BOS, *ids("is", "the", "cat", "good"), EOS]
    assert example["labels"] == [-100] * 4 + [*ids("good"), EOS]
    assert example["attention_mask"] == [1] * 6
    assert asked == [BOS, *ids("is", "the", "cat")]
    both, _ = one("is the cat", "good", reading(tiny_tokenizer(WORDS, "llama")), loss_on="all")
    assert both["labels"] == both["input_ids"]


def test_separators_behind_a_text_do_not_come_between():
    # A BERT tokenizer, as BLIP has it: the separator ends the answer, not the prompt.
    example, asked = one("a cat", "sun", reading(tiny_tokenizer([*WORDS, "a"], "blip")), start=BOS)
    assert example["input_ids"][0] == BOS and example["input_ids"][-1] == SEP
    assert CLS not in example["input_ids"] and example["input_ids"].count(SEP) == 1
    assert len(asked) == 3


def test_a_long_prompt_loses_its_beginning_and_never_the_answer():
    how = reading(tiny_tokenizer(WORDS, "llama"), limit=6)
    with pytest.warns(UserWarning, match="file: 1 of 1 prompts are cut on the left to 6 tokens"):
        example, asked = one("one two three four sun moon", "good bad", how)
    assert example["input_ids"] == [BOS, *ids("sun", "moon", "good", "bad"), EOS]
    assert asked == [BOS, *ids("sun", "moon")]
    assert example["labels"] == [-100] * 3 + [*ids("good", "bad"), EOS]


def test_an_answer_is_cut_where_it_alone_is_too_long():
    how = reading(tiny_tokenizer(WORDS, "llama"), limit=5)
    with pytest.warns(UserWarning) as caught:
        example, _ = one("cat dog", "one two three four", how)
    assert example["input_ids"] == [BOS, *ids("dog", "one", "two", "three")]
    assert sorted(str(w.message).split(" are")[0] for w in caught) == ["file: 1 of 1 answers", "file: 1 of 1 prompts"]
    with pytest.warns(UserWarning, match="answers are cut on the right to 2"):
        example, _ = one("cat", "one two three four", reading(tiny_tokenizer(WORDS, "llama"), targets=2))
    assert example["labels"] == [-100, -100, *ids("one", "two")]


def test_a_limit_must_leave_room():
    for family, needed in (("llama", 4), ("qwen3", 3)):
        how = reading(tiny_tokenizer(WORDS, family), limit=needed - 1)
        with pytest.raises(LoraforgeError, match=f"no room(.|\n)*max_length {needed - 1}(.|\n)*{needed} or more"):
            encode_continuations(["cat"], ["dog"], how, ["line 1"])
    for pairs, needed in ((None, 3), (["dog"], 5)):
        with pytest.raises(LoraforgeError, match=f"no room(.|\n)*{needed} or more"):
            encode_texts(["cat"], pairs, reading(tiny_tokenizer(WORDS, "bert"), limit=needed - 1), ["line 1"])


def test_texts_and_pairs_are_cut_with_a_warning():
    tokenizer = tiny_tokenizer(WORDS, "bert")
    found = encode_texts(["good cat"], ["bad"], reading(tokenizer), ["line 1"])[0]
    assert found["input_ids"].tolist() == [CLS, *ids("good", "cat"), SEP, *ids("bad"), SEP]
    assert found["token_type_ids"].tolist() == [0, 0, 0, 0, 1, 1]
    with pytest.warns(UserWarning, match="1 of 2 texts are cut on the right to 4 tokens"):
        found = encode_texts(["one two three", "one two"], None, reading(tokenizer, limit=4), ["line 1", "line 2"])
    assert [e["input_ids"].tolist() for e in found] == [[CLS, *ids("one", "two"), SEP]] * 2


def test_answers_of_encoder_decoders_end():
    for family in ("t5", "qwen3"):  # the second adds no end token by itself
        found = encode_answers(["is the cat"], ["good"], reading(tiny_tokenizer(WORDS, family)), ["line 1"])[0]
        assert found["labels"].tolist() == [*ids("good"), EOS]
    with pytest.warns(UserWarning, match="1 of 1 answers are cut on the right to 3"):
        how = reading(tiny_tokenizer(WORDS, "t5"), targets=3)
        found = encode_answers(["is"], ["one two three four"], how, ["line 1"])[0]
    assert found["labels"].tolist() == [*ids("one", "two"), EOS]


def test_texts_that_a_base_cannot_read():
    tokenizer = tiny_tokenizer(WORDS, "bert")
    with pytest.raises(LoraforgeError, match="does not know the words"):
        encode_texts(["quark boson"], None, reading(tokenizer), ["line 1"])
    small = LlamaConfig(vocab_size=8)
    with pytest.raises(LoraforgeError, match=r"outside the model's vocabulary(.|\n)*line 1"):
        encode_texts(["one two"], None, reading(tokenizer, config=small), ["line 1"])


def test_padding_token():
    words = tiny_tokenizer(WORDS, "llama")
    assert words.pad_token_id is None
    assert pad_token_id_of(words, None) == EOS
    assert pad_token_id_of(words, LlamaConfig(pad_token_id=7)) == 7
    assert pad_token_id_of(tiny_tokenizer(WORDS, "bert"), LlamaConfig(pad_token_id=None)) == PAD
    assert pad_token_id_of(None, LlamaConfig(pad_token_id=None, eos_token_id=[5, 6])) == 5
    assert pad_token_id_of(None, None) is None
