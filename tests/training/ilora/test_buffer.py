"""The replay buffer: what it holds with which probability, what comes back, and its files."""

from __future__ import annotations

import random
import stat
from collections import Counter

import numpy as np
import pytest
import torch

from loraforge.errors import LoraforgeError
from loraforge.training.ilora.buffer import ReplayBuffer, merge_reservoirs
from tests.oracles import ilora as oracle
from tests.training.ilora.models import class_rows, image_rows, text_rows


def numbered(count, start=0):
    return [{"input_ids": torch.tensor([start + at])} for at in range(count)]


def held(buffer):
    return sorted(int(row["input_ids"][0]) for row in buffer.rows)


def test_every_offered_row_is_held_with_the_same_probability():
    n, K, trials = 24, 6, 400
    counts = np.zeros(n)
    rows = numbered(n)
    for seed in range(trials):
        buffer = ReplayBuffer(K, seed=seed, dedup=False)
        buffer.offer(rows, 0)
        counts[held(buffer)] += 1
    p = K / n
    z = (counts / trials - p) / np.sqrt(p * (1 - p) / trials)
    # 24 slots: the largest of 24 normal deviates is under 4 but for one case in 500.
    assert np.abs(z).max() < 4.0
    theirs = (oracle.inclusion_frequencies(n, K, trials) - p) / np.sqrt(p * (1 - p) / trials)
    assert np.abs(theirs).max() < 4.0
    assert counts.sum() == trials * K


def test_a_row_comes_back_as_it_was_offered():
    rows = text_rows(3) + [{**row, "token_type_ids": torch.zeros_like(row["input_ids"])} for row in text_rows(2, 7)]
    buffer = ReplayBuffer(10)
    buffer.offer(rows, 4)
    drawn = buffer.draw(10)
    assert len(drawn) == 5
    wanted = {tuple(row["input_ids"].tolist()): row for row in rows}
    for row in drawn:
        original = wanted.pop(tuple(row["input_ids"].tolist()))
        assert row.keys() == original.keys() | {"task"}
        assert int(row["task"]) == 4
        for key in original.keys() - {"task"}:
            assert row[key].dtype == torch.int64 and torch.equal(row[key], original[key])
    images = ReplayBuffer(2)
    images.offer(image_rows(2), 0)
    assert {row["pixel_values"].dtype for row in images.draw(2)} == {torch.float32}
    assert "attention_mask" not in images.draw(1)[0]


def test_rows_are_copies_and_large_numbers_stay():
    ids = torch.tensor([2**40, 3])
    buffer = ReplayBuffer(2)
    buffer.offer([{"input_ids": ids, "labels": torch.tensor(1)}], 0)
    ids.zero_()
    assert buffer.draw(1)[0]["input_ids"].tolist() == [2**40, 3]


def test_a_draw_has_no_row_twice_and_none_of_the_excluded_task():
    buffer = ReplayBuffer(20, seed=1)
    buffer.offer(numbered(8), 0)
    buffer.offer(numbered(6, 100), 1)
    for _ in range(20):
        drawn = [int(row["input_ids"][0]) for row in buffer.draw(5, exclude_task=1)]
        assert len(set(drawn)) == 5 and max(drawn) < 100
    assert len(buffer.draw(50, exclude_task=1)) == 8
    assert len(buffer.draw(50)) == 14
    assert buffer.draw(5, exclude_task=None) and ReplayBuffer(4).draw(2) == []
    seen = Counter(int(row["input_ids"][0]) for _ in range(400) for row in buffer.draw(2, exclude_task=1))
    # 400 draws of 2 of 8: 100 each, standard deviation under 9.
    assert all(abs(count - 100) < 36 for count in seen.values()) and len(seen) == 8


def test_equal_rows_are_taken_once():
    buffer = ReplayBuffer(10)
    buffer.offer(numbered(4), 0)
    buffer.offer(numbered(5), 0)
    assert held(buffer) == [0, 1, 2, 3, 4] and buffer.seen == 5
    buffer.offer(numbered(2), 1)  # another task's rows are others
    assert buffer.histogram() == {0: 5, 1: 2}
    again = ReplayBuffer(10, dedup=False)
    again.offer(numbered(2), 0)
    again.offer(numbered(2), 0)
    assert len(again) == 4


def test_task_balanced_shares_the_capacity_and_stays_uniform_within_a_task():
    counts: Counter[int] = Counter()
    trials, K = 250, 6
    for seed in range(trials):
        buffer = ReplayBuffer(K, seed=seed, policy="task_balanced", dedup=False)
        buffer.offer(numbered(10), 0)
        assert len(buffer) == K
        buffer.offer(numbered(20, 100), 1)
        assert buffer.histogram() == {0: 3, 1: 3}
        counts.update(held(buffer))
    for first, many in ((0, 10), (100, 20)):
        p = 3 / many
        z = [(counts[first + at] / trials - p) / np.sqrt(p * (1 - p) / trials) for at in range(many)]
        assert max(map(abs, z)) < 4.2
    third = ReplayBuffer(7, policy="task_balanced")
    for task in range(3):
        third.offer(numbered(20, 1000 * task), task)
    assert third.histogram() == {0: 3, 1: 2, 2: 2}


def test_a_small_first_task_may_vanish_from_a_plain_reservoir_but_not_from_a_balanced_one():
    plain, balanced = (ReplayBuffer(20, policy=policy) for policy in ("reservoir", "task_balanced"))
    for buffer in (plain, balanced):
        buffer.offer(numbered(20), 0)
        buffer.offer(numbered(400, 100), 1)
    assert plain.histogram().get(0, 0) < 5
    assert balanced.histogram() == {0: 10, 1: 10}


def assert_same_state(a, b):
    assert {k: v for k, v in a.items() if k != "rows"} == {k: v for k, v in b.items() if k != "rows"}
    assert len(a["rows"]) == len(b["rows"])
    for x, y in zip(a["rows"], b["rows"], strict=True):
        assert x.keys() == y.keys()
        assert all(x[key].dtype == y[key].dtype and torch.equal(x[key], y[key]) for key in x)


def test_a_file_holds_everything_and_its_owner_alone_may_read_it(tmp_path):
    buffer = ReplayBuffer(8, seed=3)
    buffer.offer(text_rows(20), 0)
    buffer.offer(class_rows(5, seed=4), 1)
    buffer.offer(image_rows(3), 2)
    buffer.draw(3)
    path = tmp_path / "deep" / "buffer.safetensors"
    buffer.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    again = ReplayBuffer.load(path)
    assert_same_state(again.state_dict(), buffer.state_dict())
    for one in (buffer, again):
        one.offer(text_rows(10, seed=9), 3)
    assert_same_state(again.state_dict(), buffer.state_dict())
    bytes_of = path.read_bytes()
    ReplayBuffer.load(path).save(path)
    assert path.read_bytes() == bytes_of


def test_an_empty_buffer_has_a_file_too(tmp_path):
    ReplayBuffer(5).save(tmp_path / "b.safetensors")
    assert len(ReplayBuffer.load(tmp_path / "b.safetensors")) == 0


def test_a_file_that_is_none_is_named(tmp_path):
    path = tmp_path / "b.safetensors"
    with pytest.raises(LoraforgeError, match="cannot be read") as error:
        ReplayBuffer.load(path)
    assert error.value.where == str(path)
    ReplayBuffer(5).save(path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(LoraforgeError, match="cannot be read"):
        ReplayBuffer.load(path)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(LoraforgeError, match="no replay buffer"):
        ReplayBuffer.load(path)


def shards_of(n, K, world, seed):
    parts = []
    for rank in range(world):
        part = ReplayBuffer(K // world, seed=seed, rank=rank, world=world, dedup=False)
        part.offer([row for at, row in enumerate(numbered(n)) if at % world == rank], 0)
        parts.append(part)
    return parts


def test_shards_that_fit_are_joined_whole_and_larger_ones_uniformly():
    n, world, trials = 24, 2, 400
    whole = merge_reservoirs([part.state_dict() for part in shards_of(n, 8, world, 0)], 8, random.Random(0))
    assert len(whole["rows"]) == 8 and whole["seen"] == n
    counts = np.zeros(n)
    for seed in range(trials):
        parts = shards_of(n, 16, world, seed)
        merged = merge_reservoirs([part.state_dict() for part in parts], 6, random.Random(seed))
        counts[[int(row["input_ids"][0]) for row in merged["rows"]]] += 1
    p = 6 / n
    assert np.abs((counts / trials - p) / np.sqrt(p * (1 - p) / trials)).max() < 4.0
    # The oracle, from reservoirs of its own, is uniform by the same measure.
    theirs = np.zeros(n)
    for seed in range(trials):
        generator = random.Random(seed)
        pools = [oracle.Reservoir(8, generator) for _ in range(world)]
        for item in range(n):
            pools[item % world].offer(item)
        theirs[oracle.merge_reservoirs(pools, 6, generator).items] += 1
    assert np.abs((theirs / trials - p) / np.sqrt(p * (1 - p) / trials)).max() < 4.0


def test_another_number_of_processes_deals_the_rows_out_anew(tmp_path):
    from loraforge.training.ilora.packing import write_states

    parts = shards_of(10, 12, 2, 0)
    for part in parts:
        part.offer(numbered(3, 100 + 10 * part.rank), 1)
    path = tmp_path / "b.safetensors"
    write_states(path, [part.state_dict() for part in parts])
    for rank, part in enumerate(parts):
        assert_same_state(ReplayBuffer.load(path, rank=rank, world=2).state_dict(), part.state_dict())
    everything = sorted(held(parts[0]) + held(parts[1]))
    three = [ReplayBuffer.load(path, rank=rank, world=3) for rank in range(3)]
    assert sorted(held(three[0]) + held(three[1]) + held(three[2])) == everything
    assert [part.capacity for part in three] == [4, 4, 4]
    assert sum(part.seen for part in three) == 16
    histograms = [part.histogram() for part in three]
    assert max(h.get(1, 0) for h in histograms) - min(h.get(1, 0) for h in histograms) <= 1
    smaller = ReplayBuffer.load(path, capacity=5)
    assert len(smaller) == 5 and smaller.capacity == 5 and set(held(smaller)) <= set(everything)


def test_fewer_places_than_processes_are_refused():
    with pytest.raises(LoraforgeError, match="smaller than the number of processes"):
        ReplayBuffer(1).shard(0, 2)


def test_what_one_process_was_offered_no_other_takes_up():
    parts = [ReplayBuffer(4, rank=rank, world=2) for rank in range(2)]
    parts[0].offer(numbered(2), 0)
    parts[1].offer(numbered(2, 50), 0)
    codes = parts[0].fresh | parts[1].fresh
    for part in parts:
        part.exchange(codes)
    parts[0].offer(numbered(2, 50), 0)
    parts[1].offer(numbered(2), 0)
    assert held(parts[0]) == [0, 1] and held(parts[1]) == [50, 51]


def test_it_draws_from_no_generator_but_its_own():
    torch.manual_seed(0)
    random.seed(0)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    buffer = ReplayBuffer(4)
    buffer.offer(numbered(50), 0)
    buffer.draw(3)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1])
