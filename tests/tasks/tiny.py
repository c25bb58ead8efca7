"""Tiny bases of many families, saved to a folder with tokenizer or image processor, and files of rows. No network."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as tf

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<cls>", "<sep>")
PAD, EOS, BOS, UNK, CLS, SEP = range(6)
WORDS = tuple("good bad fine poor red blue one two three four sun moon cat dog up down yes no is the".split())
POSITIONS = 64
IMAGE = 8
FAMILIES = ("bert", "roberta", "deberta-v2", "llama", "qwen3", "gpt2", "t5", "bart", "vit", "blip")
# What a family's own tokenizer puts around one text and around two.
_TEMPLATES = {
    "bert": ("<cls> $A <sep>", "<cls> $A <sep> $B:1 <sep>:1"),
    "roberta": ("<bos> $A <eos>", "<bos> $A <eos> <eos> $B <eos>"),
    "deberta-v2": ("<cls> $A <sep>", "<cls> $A <sep> $B:1 <sep>:1"),
    "llama": ("<bos> $A", "<bos> $A $B"),
    "t5": ("$A <eos>", "$A <eos> $B <eos>"),
    "bart": ("<bos> $A <eos>", "<bos> $A <eos> <eos> $B <eos>"),
    "blip": ("<cls> $A <sep>", "<cls> $A <sep> $B <sep>"),
}


def tiny_tokenizer(words: Iterable[str], family: str = "bert") -> tf.PreTrainedTokenizerFast:
    """A tokenizer of whole words with the special tokens of a family: ids 0 to 5 are SPECIAL, then the words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = [*SPECIAL, *dict.fromkeys(words)]
    vocab = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if family in _TEMPLATES:
        single, pair = _TEMPLATES[family]
        specials = [(name, vocab[name]) for name in SPECIAL]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=specials)
    special: dict[str, Any] = {"unk_token": "<unk>"}
    if family not in ("bert", "blip"):
        special["eos_token"] = "<eos>"
    if family not in ("gpt2", "llama"):
        special["pad_token"] = "<pad>"
    if family in ("llama", "roberta", "bart"):
        special["bos_token"] = "<bos>"
    if family in ("bert", "deberta-v2", "blip"):
        special |= {"cls_token": "<cls>", "sep_token": "<sep>"}
    names = ["input_ids", "attention_mask"]
    if family in ("bert", "deberta-v2"):
        names.insert(1, "token_type_ids")
    side = "left" if family == "qwen3" else "right"
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=POSITIONS, model_input_names=names, padding_side=side, **special
    )


def tiny_base(
    folder: Path,
    family: str,
    *,
    vocab_words: Sequence[str] = WORDS,
    seed: int = 0,
    hidden: int = 16,
    layers: int = 2,
    dropout: float = 0.0,
) -> Path:
    """A random base of a family in `folder` (config, weights, tokenizer or image processor); the headless class.

    bert, roberta and deberta-v2 are saved without a head, as an encoder is; vit as ViTModel; the others with their
    language-model head. T5 has relative positions, so its length has no limit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocab = len(SPECIAL) + len(dict.fromkeys(vocab_words))
    model = _model(family, vocab, hidden, layers, dropout, seed)
    model.save_pretrained(folder)
    if family != "vit":
        tiny_tokenizer(vocab_words, family).save_pretrained(folder)
    if family in ("vit", "blip"):
        (folder / "preprocessor_config.json").write_text(json.dumps(_processor(family)))
    return folder


def _processor(family: str) -> dict[str, Any]:
    return {
        "image_processor_type": "ViTImageProcessor" if family == "vit" else "BlipImageProcessor",
        "size": {"height": IMAGE, "width": IMAGE},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
    }


def _model(family: str, vocab: int, hidden: int, layers: int, dropout: float, seed: int) -> tf.PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _BUILDERS[family](vocab, hidden, layers, dropout)


def _encoder(vocab: int, hidden: int, layers: int, dropout: float) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 2 * hidden,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        "max_position_embeddings": POSITIONS,
        "pad_token_id": PAD,
        "initializer_range": 0.2,
    }


def _bert(*sizes: Any) -> tf.PreTrainedModel:
    return tf.BertModel(tf.BertConfig(**_encoder(*sizes), classifier_dropout=sizes[3]))


def _roberta(*sizes: Any) -> tf.PreTrainedModel:
    values = _encoder(*sizes) | {"max_position_embeddings": POSITIONS + PAD + 1, "type_vocab_size": 1}
    config = tf.RobertaConfig(**values, bos_token_id=BOS, eos_token_id=EOS, classifier_dropout=sizes[3])
    return tf.RobertaModel(config)


def _deberta(*sizes: Any) -> tf.PreTrainedModel:
    config = tf.DebertaV2Config(
        **_encoder(*sizes),
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        position_biased_input=False,
        type_vocab_size=0,
        pooler_dropout=sizes[3],
    )
    return tf.DebertaV2Model(config)


def _decoder(vocab: int, hidden: int, layers: int, dropout: float) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 2 * hidden,
        "attention_dropout": dropout,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.2,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
    }


def _llama(*sizes: Any) -> tf.PreTrainedModel:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**_decoder(*sizes), bos_token_id=BOS))


def _qwen3(*sizes: Any) -> tf.PreTrainedModel:
    config = tf.Qwen3Config(**_decoder(*sizes), head_dim=sizes[1] // 4, pad_token_id=PAD, bos_token_id=None)
    return tf.Qwen3ForCausalLM(config)


def _gpt2(vocab: int, hidden: int, layers: int, dropout: float) -> tf.PreTrainedModel:
    config = tf.GPT2Config(
        vocab_size=vocab,
        n_embd=hidden,
        n_layer=layers,
        n_head=2,
        n_positions=POSITIONS,
        bos_token_id=EOS,
        eos_token_id=EOS,
        embd_pdrop=dropout,
        resid_pdrop=dropout,
        attn_pdrop=dropout,
        initializer_range=0.2,
    )
    return tf.GPT2LMHeadModel(config)


def _t5(vocab: int, hidden: int, layers: int, dropout: float) -> tf.PreTrainedModel:
    config = tf.T5Config(
        vocab_size=vocab,
        d_model=hidden,
        d_kv=hidden // 2,
        d_ff=2 * hidden,
        num_layers=layers,
        num_heads=2,
        dropout_rate=dropout,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,
    )
    return tf.T5ForConditionalGeneration(config)


def _vit(vocab: int, hidden: int, layers: int, dropout: float) -> tf.PreTrainedModel:
    sizes = _encoder(vocab, hidden, layers, dropout)
    names = ("vocab_size", "max_position_embeddings", "pad_token_id")
    values = {key: value for key, value in sizes.items() if key not in names}
    return tf.ViTModel(tf.ViTConfig(**values, image_size=IMAGE, patch_size=4), add_pooling_layer=False)


def _blip(vocab: int, hidden: int, layers: int, dropout: float) -> tf.PreTrainedModel:
    words = _encoder(vocab, hidden, layers, dropout) | {
        "encoder_hidden_size": hidden,
        "bos_token_id": BOS,
        "sep_token_id": SEP,
        "eos_token_id": SEP,
    }
    vision = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 2 * hidden,
        "image_size": IMAGE,
        "patch_size": 4,
        "initializer_range": 0.2,
        "attention_dropout": dropout,
    }
    config = tf.BlipConfig(
        text_config=words, vision_config=vision, projection_dim=hidden, image_text_hidden_size=hidden
    )
    return tf.BlipForConditionalGeneration(config)


def _bart(vocab: int, hidden: int, layers: int, dropout: float) -> tf.PreTrainedModel:
    config = tf.BartConfig(
        vocab_size=vocab,
        d_model=hidden,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=2 * hidden,
        decoder_ffn_dim=2 * hidden,
        max_position_embeddings=POSITIONS,
        dropout=dropout,
        attention_dropout=dropout,
        activation_dropout=dropout,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        decoder_start_token_id=EOS,
        forced_eos_token_id=None,
        init_std=0.2,
    )
    return tf.BartForConditionalGeneration(config)


_BUILDERS = {
    "bert": _bert,
    "roberta": _roberta,
    "deberta-v2": _deberta,
    "llama": _llama,
    "qwen3": _qwen3,
    "gpt2": _gpt2,
    "t5": _t5,
    "bart": _bart,
    "vit": _vit,
    "blip": _blip,
}


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Rows as .jsonl, .json, .csv, .tsv (with a header) or .parquet, by the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(rows)), encoding="utf-8")
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), path)
    else:
        raise ValueError(f"no writer of rows for {path.suffix}")
    return path
