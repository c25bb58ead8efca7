from __future__ import annotations

import pytest
import torch
import transformers as tf

from loraforge.calibrate.batches import make_batches
from loraforge.calibrate.data import CalibrationSet, load_calibration
from loraforge.errors import LoraforgeError


def text_set(name: str, lengths: list[int], seed: int = 0) -> CalibrationSet:
    g = torch.Generator().manual_seed(seed)
    return load_calibration([{"input_ids": torch.randint(1, 90, (n,), generator=g)} for n in lengths], name=name)


def test_batches_hold_one_task_and_fold_and_every_sample_once() -> None:
    sets = [text_set("a", [3, 9, 1, 7, 7]), text_set("b", [2, 2, 8], seed=1)]
    folds = [[0, 1, 0, 1, 0], [1, 1, 0]]
    batches = make_batches(sets, folds, batch_tokens=16, pad_id=99)
    seen = {(b.task, b.fold, i) for b in batches for i in b.indices}
    assert seen == {(t, f, i) for t, fold in enumerate(folds) for i, f in enumerate(fold)}
    assert sum(len(b.indices) for b in batches) == 8
    assert [(b.task, b.fold) for b in batches] == sorted((b.task, b.fold) for b in batches)
    for batch in batches:
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        assert ids.numel() <= 16 and ids.dtype == torch.int64
        assert batch.enc_mask is not None and torch.equal(batch.enc_mask, mask.bool()) and batch.dec_mask is None
        lengths = mask.sum(1).tolist()
        assert lengths == sorted(lengths, reverse=True) and lengths[0] == ids.shape[1]
        for row, index in enumerate(batch.indices):
            sample = sets[batch.task].samples[index]["input_ids"]
            assert torch.equal(ids[row, : len(sample)], sample) and bool((ids[row, len(sample) :] == 99).all())


def test_a_sample_longer_than_the_bound_stands_alone() -> None:
    batches = make_batches([text_set("a", [30, 2, 2])], [[0, 0, 0]], batch_tokens=8)
    assert [b.inputs["input_ids"].shape for b in batches] == [(1, 30), (2, 2)]


def test_row_order_changes_no_batch() -> None:
    one = text_set("a", [4, 4, 4, 6, 2])
    order = [3, 0, 4, 2, 1]
    other = load_calibration([one.samples[i] for i in order], name="a")
    folds = [0, 1, 0, 0, 1]
    first = make_batches([one], [folds], batch_tokens=10)
    second = make_batches([other], [[folds[i] for i in order]], batch_tokens=10)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.inputs["input_ids"], b.inputs["input_ids"])
        assert [order[i] for i in b.indices] == list(a.indices)


def test_padding_columns_of_the_source_go_and_other_masks_stay() -> None:
    tensors = {
        "input_ids": torch.tensor([[5, 6, 0, 0, 0], [0, 7, 8, 0, 0], [4, 0, 9, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [1, 0, 1, 0, 0]]),
    }
    (batch,) = make_batches([load_calibration(tensors, name="a")], [[0, 0, 0]], pad_id=3)
    rows = dict(
        zip(batch.indices, zip(batch.inputs["input_ids"].tolist(), batch.enc_mask.tolist(), strict=True), strict=True)
    )
    assert rows[0] == ([5, 6, 3], [True, True, False])
    assert rows[1] == ([0, 7, 8], [False, True, True])  # padding on the left moves positions
    assert rows[2] == ([4, 0, 9], [True, False, True])


def test_encoder_decoder_counts_and_masks_both_sides() -> None:
    samples = [
        {"input_ids": torch.arange(1, 4), "decoder_input_ids": torch.arange(5)},
        {"input_ids": torch.arange(1, 6), "decoder_input_ids": torch.arange(2)},
    ]
    cset = load_calibration(samples, name="a")
    (batch,) = make_batches([cset], [[0, 0]], batch_tokens=20, pad_id=7)
    assert batch.enc_mask.sum(1).tolist() == [5, 3] and batch.dec_mask.sum(1).tolist() == [2, 5]
    assert batch.inputs["decoder_input_ids"].tolist() == [[0, 1, 7, 7, 7], [0, 1, 2, 3, 4]]
    assert len(make_batches([cset], [[0, 0]], batch_tokens=19)) == 2


def test_images_count_their_patches_and_have_no_mask() -> None:
    cset = load_calibration({"pixel_values": torch.randn(5, 3, 8, 8)}, name="a")
    batches = make_batches([cset], [[0] * 5], batch_tokens=34, image_tokens=17)
    assert [len(b.indices) for b in batches] == [2, 2, 1]
    assert batches[0].enc_mask is None and batches[0].inputs["pixel_values"].shape == (2, 3, 8, 8)
    assert len(make_batches([cset], [[0] * 5], batch_tokens=5)) == 1


def test_batch_samples_is_the_documents_inner_num() -> None:
    batches = make_batches([text_set("a", [4] * 6)], [[0] * 6], batch_samples=2)
    assert [len(b.indices) for b in batches] == [2, 2, 2]


def test_wrong_counts_are_refused() -> None:
    cset = text_set("a", [3, 4])
    with pytest.raises(LoraforgeError, match="number of tasks"):
        make_batches([cset], [])
    with pytest.raises(LoraforgeError, match="1 folds for 2 samples"):
        make_batches([cset], [[0]])
    with pytest.raises(LoraforgeError, match="batch_tokens"):
        make_batches([cset], [[0, 0]], batch_tokens=0)


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_padding_changes_no_output(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "bert":
        config = tf.BertConfig(
            vocab_size=90, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
        )
        model = tf.BertModel(config).double().eval()
    else:
        config = tf.T5Config(
            vocab_size=90, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
        model = tf.T5Model(config).double().eval()
    rows = [{"input_ids": torch.randint(1, 90, (n,))} for n in (7, 2, 5)]
    if kind == "t5":
        rows = [row | {"decoder_input_ids": torch.randint(1, 90, (n,))} for row, n in zip(rows, (1, 4, 3), strict=True)]
    (batch,) = make_batches([load_calibration(rows, name="a")], [[0] * 3], pad_id=1)
    mask = batch.enc_mask if batch.dec_mask is None else batch.dec_mask
    with torch.no_grad():
        together = model(**batch.inputs).last_hidden_state
        for i, index in enumerate(batch.indices):
            alone = model(**{key: value[None] for key, value in rows[index].items()}).last_hidden_state[0]
            # float64 rounding only: a padded token that took part would change the first digits
            assert torch.allclose(together[i][mask[i]], alone, atol=1e-12)
