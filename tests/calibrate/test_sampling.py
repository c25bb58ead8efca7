from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraforge.calibrate.sampling import Selection, assign_folds, choose, content_hash, fold_of
from loraforge.calibrate.tensors import trim_padding
from loraforge.errors import LoraforgeError


def sample(*ids: int) -> dict[str, torch.Tensor]:
    return trim_padding({"input_ids": torch.tensor(ids)})


def padded(ids: list[int], left: int, right: int, pad: int) -> dict[str, torch.Tensor]:
    mask = [0] * left + [1] * len(ids) + [0] * right
    return {
        "input_ids": torch.tensor([pad] * left + ids + [pad] * right, dtype=torch.int32),
        "attention_mask": torch.tensor(mask),
    }


def test_all_of_a_smaller_file_and_the_first() -> None:
    assert choose(Selection(), [5, 1, 9], None) == [0, 1, 2]
    assert choose(Selection(samples_num=None), list(range(500)), None) == list(range(500))
    assert choose(Selection(samples_num=2, shuffle=False), [5, 1, 9], None) == [0, 1]


def test_shuffle_is_seeded_and_without_repeats() -> None:
    first = choose(Selection(samples_num=10, seed=1), [1] * 40, None)
    assert first == choose(Selection(samples_num=10, seed=1), [1] * 40, None)
    assert first != choose(Selection(samples_num=10, seed=2), [1] * 40, None)
    assert len(set(first)) == 10 and first != list(range(10))


def test_select_long_keeps_the_longer_two_thirds() -> None:
    lengths = list(range(30))
    longest = choose(Selection(samples_num=5, select_long=True, shuffle=False), lengths, None)
    assert longest == [29, 28, 27, 26, 25]
    drawn = choose(Selection(samples_num=20, select_long=True), lengths, None)
    assert sorted(drawn) == list(range(10, 30))
    assert choose(Selection(select_long=True), [3], None) == [0]


def test_select_long_ranks_3000_and_keeps_2000() -> None:
    lengths = list(range(9000))
    kept = choose(Selection(samples_num=None, select_long=True, shuffle=False), lengths, None)
    assert len(kept) == 2000 and kept == sorted(kept, reverse=True)
    assert min(kept) < 8000  # drawn first, not the longest of all


def test_balance_takes_the_floor_and_the_last_class_the_rest() -> None:
    labels = ["a"] * 50 + ["b"] * 50 + ["c"] * 50
    chosen = choose(Selection(samples_num=20, if_balance=True), [1] * 150, labels)
    counts = sorted(sum(labels[i] == name for i in chosen) for name in "abc")
    assert counts == [6, 6, 8] and len(set(chosen)) == 20
    last = {
        labels[choose(Selection(samples_num=20, if_balance=True, seed=s), [1] * 150, labels)[-1]] for s in range(12)
    }
    assert len(last) > 1  # the order of the classes goes by the seed


def test_balance_needs_labels() -> None:
    with pytest.raises(LoraforgeError, match="file.jsonl"):
        choose(Selection(if_balance=True), [1, 2], None, "file.jsonl")
    with pytest.raises(LoraforgeError, match="if_balance"):
        choose(Selection(if_balance=True), [1, 2], ["a", None])


def test_divide_must_multiply_out() -> None:
    assert Selection(samples_num=60, if_divide=True, inner_num=6, outer_num=10).batch_samples == 6
    assert Selection(samples_num=50, inner_num=6).batch_samples is None
    with pytest.raises(LoraforgeError, match="6 x 10 for 50"):
        Selection(samples_num=50, if_divide=True, inner_num=6, outer_num=10)
    with pytest.raises(LoraforgeError, match="samples_num"):
        Selection(samples_num=0)


@given(st.lists(st.integers(0, 99), min_size=1, max_size=8), st.integers(0, 3), st.integers(0, 3), st.integers(0, 99))
def test_padding_and_integer_width_do_not_change_the_hash(ids: list[int], left: int, right: int, pad: int) -> None:
    assert content_hash(padded(ids, left, right, pad)) == content_hash(sample(*ids))
    assert fold_of(padded(ids, left, right, pad), 3) == fold_of(sample(*ids), 3)


def test_hash_depends_on_content() -> None:
    hashes = {
        content_hash(s) for s in (sample(1, 2), sample(2, 1), sample(1, 2, 0), {"pixel_values": torch.ones(1, 2, 2)})
    }
    assert len(hashes) == 4
    one = {**sample(1, 2), "decoder_input_ids": torch.tensor([0, 5]), "decoder_attention_mask": torch.tensor([1, 1])}
    other = {**one, "decoder_input_ids": torch.tensor([0, 6])}
    assert content_hash(one) != content_hash(other)
    assert {fold_of(sample(i), 4) for i in range(64)} == {0, 1, 2, 3}


@settings(max_examples=40)
@given(st.lists(st.integers(0, 500), min_size=1, max_size=40, unique=True), st.integers(1, 6), st.randoms())
def test_folds_are_balanced_and_forget_the_order(values: list[int], folds: int, random: object) -> None:
    assigned = assign_folds([sample(v) for v in values], folds)
    counts = [assigned.count(f) for f in range(folds)]
    assert max(counts) - min(counts) <= 1
    order = list(range(len(values)))
    random.shuffle(order)  # type: ignore[attr-defined]
    again = assign_folds([sample(values[i]) for i in order], folds)
    assert again == [assigned[i] for i in order]


def test_equal_samples_share_a_fold() -> None:
    values = [1, 2, 1, 3, 1, 4, 5, 6]
    assigned = assign_folds([sample(v) for v in values], 2)
    assert len({assigned[i] for i in (0, 2, 4)}) == 1
    assert sorted(assigned.count(f) for f in range(2)) == [4, 4]
    with pytest.raises(LoraforgeError, match="folds"):
        assign_folds([sample(1)], 0)
