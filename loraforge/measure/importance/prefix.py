"""Forward passes that begin in the middle of a model: the layers below return what they gave before.

A pass that gates a head of layer l differs from the plain one from layer l on. So the output of layer l - 1 is saved
once, and the forwards of the layers below are replaced by functions that return it; embeddings, masks, positions and
whatever else a model makes before its layers are made as always. No model is rewritten for this, and the numbers are
those of the whole pass, to the bit. The cost of L layers of ablations falls by the factor 2L / (L + 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from loraforge.measure.heads.find import modules_of


class _Reached(Exception):
    """Ends a pass behind the last layer that was wanted; never leaves this module."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a layer within a pass.

    Attributes:
        layer: Its dotted name.
        tokens: Rows x positions that went into it.
        nbytes: Bytes of the hidden states that went into it.
    """

    layer: str
    tokens: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Saved:
    """What the layers below give, for one batch.

    Attributes:
        below: How many layers were run, in the order of the pass.
        outputs: Stack of layers -> the output of the last of them that was run.
        rows: Rows of the batch.
    """

    below: int
    outputs: dict[str, Any]
    rows: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(self.outputs))

    @property
    def is_by_rows(self) -> bool:
        """Whether every tensor has the rows first, or is the same for all of them."""
        return all(tensor.dim() == 0 or tensor.shape[0] in (1, self.rows) for tensor in _tensors(self.outputs))


class Prefix:
    """The layers of a model in the order in which a pass runs them.

    Args:
        model: A transformers model, or one with an adapter of PEFT in it.
        layers: Dotted names in the transformers model, each once, in any order.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        there = modules_of(model)
        self._modules: dict[str, nn.Module] = {name: there[name] for name in layers}
        self.order: tuple[str, ...] = ()

    @contextmanager
    def watched(self) -> Iterator[list[Call]]:
        """Notes the calls of the layers in the passes run meanwhile; the first one says the order."""
        calls: list[Call] = []

        def note(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                hidden = next(_tensors([args, kwargs.get("hidden_states")]))
                calls.append(Call(name, hidden.numel() // hidden.shape[-1], hidden.numel() * hidden.element_size()))

            return hook

        handles = [m.register_forward_pre_hook(note(n), with_kwargs=True) for n, m in self._modules.items()]
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()
        if not self.order:
            self.order = tuple(call.layer for call in calls)

    @property
    def is_regular(self) -> bool:
        """Whether a pass runs every layer exactly once, so that passes may begin anywhere."""
        return len(self.order) == len(self._modules) == len(set(self.order))

    def position(self, layer: str) -> int:
        """How many layers run before this one."""
        return self.order.index(layer)

    def advance(self, forward: Callable[[], object], below: int, rows: int, start: Saved | None = None) -> Saved:
        """Runs the layers up to number `below` and saves what they give; nothing above them is run.

        Args:
            forward: A whole pass over the batch.
            below: How many layers to have run, in `order`.
            rows: Rows of the batch.
            start: What an earlier call saved, to begin there.
        """
        done = 0 if start is None else start.below
        if below == 0 or (start is not None and done == below):
            return start or Saved(0, {}, rows)
        last = {_stack(name): name for name in self.order[done:below]}
        found: dict[str, Any] = {}

        def keep(stack: str, ends: bool) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                # A copy: what runs behind the last layer of a stack may write into its output.
                found[stack] = _repeat(output, rows, 1)
                if ends:
                    raise _Reached

            return hook

        handles = [
            self._modules[name].register_forward_hook(keep(stack, name == self.order[below - 1]))
            for stack, name in last.items()
        ]
        try:
            with self.replayed(start):
                forward()
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return Saved(below, {**(start.outputs if start is not None else {}), **found}, rows)

    @contextmanager
    def replayed(self, saved: Saved | None, times: int = 1) -> Iterator[None]:
        """Layers below return what was saved while it is open; afterwards, and after any error, they compute again.

        Args:
            saved: What they give; None: every layer computes.
            times: How many times the batch is repeated along its rows.
        """
        replaced: list[nn.Module] = []
        previous: dict[nn.Module, Any] = {}
        outputs = {} if saved is None else {k: _repeat(v, saved.rows, times) for k, v in saved.outputs.items()}
        try:
            for name in self.order[: 0 if saved is None else saved.below]:
                module = self._modules[name]
                # Libraries that move weights about put a forward of their own on the object.
                if "forward" in vars(module):
                    previous[module] = vars(module)["forward"]
                replaced.append(module)
                vars(module)["forward"] = _giving(outputs[_stack(name)])
            yield
        finally:
            for module in replaced:
                if module in previous:
                    vars(module)["forward"] = previous[module]
                else:
                    vars(module).pop("forward", None)


class PrefixCache:
    """What the layers below give, for every batch, within a limit of memory.

    A batch that does not fit is run from the embeddings again whenever it is asked for: that costs one pass of the
    layers below for all heads of a layer.

    Args:
        prefix: The model's layers.
        limit: Bytes that may be kept.
    """

    def __init__(self, prefix: Prefix, limit: int) -> None:
        self._prefix = prefix
        self._kept: dict[int, Saved] = {}
        self._limit = limit
        self._bytes = 0
        self.most_bytes = 0
        self.rerun = 0

    def at(self, number: int, forward: Callable[[], object], below: int, rows: int) -> Saved:
        """What the first `below` layers give for batch `number`."""
        start = self._kept.pop(number, None)
        if start is not None:
            self._bytes -= start.nbytes
            if start.below > below:
                start = None
        elif below > 0:
            self.rerun += 1
        saved = self._prefix.advance(forward, below, rows, start)
        size = saved.nbytes
        if self._bytes + size <= self._limit:
            self._kept[number] = saved
            self._bytes += size
            self.most_bytes = max(self.most_bytes, self._bytes)
        return saved


def _stack(name: str) -> str:
    """The list that a layer is in: an encoder's and a decoder's are two."""
    return name.rpartition(".")[0]


def _giving(output: Any) -> Callable[..., Any]:
    def forward(*_args: Any, **_kwargs: Any) -> Any:
        return output

    return forward


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _repeat(value: Any, rows: int, times: int) -> Any:
    """A copy of a layer's output for the batch repeated; tensors without a dimension of rows stay as they are."""
    if isinstance(value, Tensor):
        per_row = value.dim() > 0 and value.shape[0] == rows
        return value.detach().repeat(times if per_row else 1, *[1] * (value.dim() - 1)) if value.dim() else value
    if isinstance(value, list | tuple):
        return type(value)([_repeat(item, rows, times) for item in value])
    return value
