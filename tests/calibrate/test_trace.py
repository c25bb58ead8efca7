"""What one forward shows: order, calls, shared inputs, masks; and modules that it never reaches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from loraforge.calibrate.trace import Trace, trace_model
from loraforge.errors import LoraforgeError


class Toy(nn.Module):
    """a and b read one tensor, c runs twice, `spare` never; d reads a's input after it was changed in place."""

    def __init__(self, in_place: bool = False, broken: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.a, self.b, self.c, self.d, self.spare = (nn.Linear(4, 4) for _ in range(5))
        self.in_place, self.broken = in_place, broken

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h = self.embed(input_ids)
        y = self.b(h) + self.a(h)
        if self.broken:
            raise RuntimeError("broken forward")
        if self.in_place:
            h.relu_()
        return self.d(h) + self.c(self.c(y))


IDS = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]]), "attention_mask": torch.ones(2, 3, dtype=torch.int64)}


def trace(net: Toy, names: str = "a b c d", inputs: dict[str, Tensor] = IDS) -> Trace:
    return trace_model(net, {name: getattr(net, name) for name in names.split()}, [inputs], {})


def test_order_calls_and_leaders() -> None:
    found = trace(Toy())
    assert found.order == ("b", "a", "d", "c"), "order of first call, not of names"
    assert found.calls == {"a": 1, "b": 1, "c": 2, "d": 1}
    assert found.leaders == {"b": "b", "a": "b", "d": "b", "c": "c"}
    assert not found.is_feed_forward and trace(Toy(), "a b").is_feed_forward


def test_a_tensor_changed_in_place_is_another_input() -> None:
    """The same object with other numbers: sharing its Gram would give d the Gram of a."""
    assert trace(Toy(in_place=True)).leaders == {"b": "b", "a": "b", "d": "d", "c": "c"}


def test_equal_values_in_two_tensors_are_not_shared() -> None:
    class Copies(Toy):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            h = self.embed(input_ids)
            return self.a(h) + self.b(h.clone())

    assert trace(Copies(), "a b").leaders == {"a": "a", "b": "b"}


def test_one_sample_is_enough() -> None:
    """Alone, and twice to see which dimension holds the samples."""
    net = Toy()
    seen = []
    net.a.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    trace(net)
    assert set(seen) == {1, 2}


def test_the_longest_batch_says_where_padding_is() -> None:
    one = {key: value[:, :1] for key, value in IDS.items()}
    net = Toy()
    found = trace_model(net, {"a": net.a}, [one, IDS], {})
    assert found.axis == {"a": "encoder"}


def test_calls_without_samples_do_not_count() -> None:
    class Relative(Toy):
        """a reads the tokens, then a table of positions that all samples share."""

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.a(self.embed(input_ids)) + self.a(self.embed.weight[None, :3]).mean()

    found = trace(Relative(), "a")
    assert [k is not None for k in found.kinds["a"]] == [True, False]
    assert found.calls == {"a": 1} and found.is_feed_forward


def test_sequence_first_models_are_recognised() -> None:
    class Turned(Toy):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.a(self.embed(input_ids).transpose(0, 1))

    assert trace(Turned(), "a").kinds["a"][0].sample_dim == 1  # type: ignore[union-attr]


def test_samples_in_no_usable_dimension() -> None:
    class Folded(Toy):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.a(self.embed.weight[None])

    with pytest.raises(LoraforgeError, match="told apart") as caught:
        trace(Folded(), "a")
    assert caught.value.where == "a"


def test_a_module_that_is_never_called() -> None:
    net = Toy()
    with pytest.raises(LoraforgeError, match="never runs") as caught:
        trace(net, "a spare b")
    assert caught.value.where == "spare" and caught.value.got == "1 of 3 modules never called"
    assert "target" in str(caught.value.hint)
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_hooks_are_gone_after_a_broken_forward() -> None:
    net = Toy(broken=True)
    with pytest.raises(RuntimeError, match="broken forward"):
        trace(net)
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_which_mask_applies_is_read_off_the_rows() -> None:
    class Pooled(Toy):
        """a sees every token, b the first one only (a pooler), d what the decoder reads."""

        def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
            h = self.embed(input_ids)
            return self.a(h).sum() + self.b(h[:, 0]).sum() + self.d(self.embed(decoder_input_ids)).sum()

    inputs = IDS | {"decoder_input_ids": torch.tensor([[1, 2], [3, 4]])}
    assert trace(Pooled(), "a b d", inputs).axis == {"a": "encoder", "b": "all", "d": "decoder"}


def test_a_single_token_tells_no_axis() -> None:
    one = {key: value[:, :1] for key, value in IDS.items()}
    assert set(trace(Toy(), inputs=one).axis.values()) == {"all"}
