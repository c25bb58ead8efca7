"""Decoder tokens that a task model makes itself: which are fed, which are counted, and whose weights speak."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loraforge.calibrate.batches import Batch, make_batches
from loraforge.calibrate.data import load_calibration
from loraforge.calibrate.generation import complete_batches
from loraforge.errors import LoraforgeError
from tests.calibrate import models

START, END = 0, 1
IDS = torch.tensor([[4, 5, 6], [7, 8, 0]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])


class Speaker(nn.Module):
    """Stands for an encoder-decoder model: `generate` says what it is told."""

    def __init__(self, says: list[list[int]]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.says, self.asked = torch.tensor(says), {}

    def generate(self, **asked: Any) -> Tensor:
        self.asked = asked
        return self.says


def config(**fields: Any) -> SimpleNamespace:
    known = {"is_encoder_decoder": True, "decoder_start_token_id": START, "eos_token_id": END}
    return SimpleNamespace(**{**known, **fields})


def batch(**decoder: Tensor) -> Batch:
    inputs = {"input_ids": IDS, "attention_mask": MASK, **decoder}
    mask = decoder.get("decoder_attention_mask")
    return Batch(0, 0, inputs, MASK.bool(), None if mask is None else mask.bool(), (0, 1))


def complete(says: list[list[int]], collect: str = "teacher-forced", made: Batch | None = None, **fields: Any):
    model = Speaker(says)
    (found,) = complete_batches(model, config(**fields), {}, {}, [made or batch()], collect=collect, max_new_tokens=7)
    return found, model


SAYS = [[START, 5, END, 0, 0], [START, 6, 7, 8, 9]]


def test_what_was_fed_is_all_but_the_last_token_and_nothing_after_the_end() -> None:
    found, model = complete(SAYS)
    assert found.inputs["decoder_input_ids"].tolist() == [[START, 5, END, 0], [START, 6, 7, 8]]
    assert found.dec_mask is not None
    assert found.dec_mask.tolist() == [[True, True, False, False], [True] * 4]
    assert torch.equal(found.inputs["decoder_attention_mask"], found.dec_mask.long())
    assert torch.equal(found.inputs["input_ids"], IDS) and found.enc_mask is not None
    assert set(model.asked) == {"input_ids", "attention_mask", "do_sample", "num_beams", "max_new_tokens"}
    assert (model.asked["do_sample"], model.asked["num_beams"], model.asked["max_new_tokens"]) == (False, 1, 7)


@pytest.mark.parametrize(
    ("end", "says", "mask"),
    [
        ([END, 3], [[START, 5, 3, 0], [START, END, 0, 0]], [[1, 1, 0], [1, 0, 0]]),
        (START, [[START, 5, START, 0], [START, 5, 6, START]], [[1, 1, 0], [1, 1, 1]]),
        (None, [[START, 5, END, 0], [START, 1, 1, 1]], [[1, 1, 1], [1, 1, 1]]),
    ],
    ids=["several ends", "the start token is the end token", "no end"],
)
def test_ends(end: Any, says: list[list[int]], mask: list[list[int]]) -> None:
    found, _ = complete(says, eos_token_id=end)
    assert found.dec_mask is not None and found.dec_mask.int().tolist() == mask


def test_generate_last_counts_the_last_step_before_the_end() -> None:
    found, _ = complete(SAYS, "generate-last")
    assert found.dec_mask is not None
    assert found.dec_mask.int().tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]
    assert found.inputs["decoder_attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]], "attention sees all of it"


def given() -> Batch:
    return batch(
        decoder_input_ids=torch.tensor([[START, 9, 9], [START, 8, 0]]),
        decoder_attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]),
    )


def test_given_tokens_are_taken_as_they_are() -> None:
    made = given()
    found, model = complete(SAYS, made=made)
    assert found is made and model.asked == {}
    last, model = complete(SAYS, "generate-last", made=made)
    assert model.asked == {} and torch.equal(last.inputs["decoder_input_ids"], made.inputs["decoder_input_ids"])
    assert last.dec_mask is not None and last.dec_mask.int().tolist() == [[0, 0, 1], [0, 1, 0]]


@pytest.mark.parametrize("made", [None, given()], ids=["no tokens", "given tokens"])
def test_prefill_is_the_start_token_alone(made: Batch | None) -> None:
    found, model = complete(SAYS, "prefill", made=made)
    assert model.asked == {}
    assert found.inputs["decoder_input_ids"].tolist() == [[START], [START]]
    assert found.dec_mask is not None and found.dec_mask.tolist() == [[True], [True]]


def test_the_start_token_is_looked_for_in_order() -> None:
    found, _ = complete(SAYS, "prefill", decoder_start_token_id=None, bos_token_id=6, pad_token_id=3)
    assert found.inputs["decoder_input_ids"].tolist() == [[6], [6]]
    with pytest.raises(LoraforgeError, match="no start token"):
        complete(SAYS, "prefill", decoder_start_token_id=None)


def test_other_models_have_no_decoder_to_feed() -> None:
    made = batch()
    plain = SimpleNamespace(is_encoder_decoder=False)
    for collect in ("teacher-forced", "prefill"):
        assert complete_batches(Speaker([[0]]), plain, {}, {}, [made], collect=collect, max_new_tokens=1) == [made]
    with pytest.raises(LoraforgeError, match="encoder-decoder"):
        complete_batches(Speaker([[0]]), plain, {}, {}, [made], collect="generate-last", max_new_tokens=1)


def test_each_task_model_speaks_for_itself() -> None:
    """The tokens are those of base + adapter i with dense weights, and the hooks are gone afterwards."""
    case = models.make("t5")
    case.model.generation_config.eos_token_id = END
    factors, g = case.factors(2, scale=2.0), torch.Generator().manual_seed(0)
    ids, mask = models.text(g, 3, 6, ragged=False)
    sets = [load_calibration({"input_ids": ids, "attention_mask": mask}, name=n) for n in "ab"]
    batches = make_batches(sets, [[0] * 3] * 2)
    assert [b.task for b in batches] == [0, 1]
    made = complete_batches(
        case.model, case.model.config, case.modules(), factors, batches, collect="teacher-forced", max_new_tokens=5
    )
    for task, (found, before) in enumerate(zip(made, batches, strict=True)):
        task_model = copy.deepcopy(case.model)
        for name, pairs in factors.items():
            task_model.get_submodule(name).weight.data += pairs[task].delta()
        said = task_model.generate(**before.inputs, do_sample=False, num_beams=1, max_new_tokens=5)
        assert torch.equal(found.inputs["decoder_input_ids"], said[:, :-1])
    tokens = [b.inputs["decoder_input_ids"] for b in made]
    assert not torch.equal(tokens[0], tokens[1]), "the adapters must matter, or the test shows nothing"
    assert not any(m._forward_hooks for m in case.model.modules())
