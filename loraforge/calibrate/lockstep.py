"""Many batches walk through one model in step, pausing together at every target module.

Each calibration batch runs its forward in a carrier of its own, and they take turns. When a batch reaches a target
module it stops there; when all have arrived, the whole calibration set's inputs of that module lie side by side, the
visitor may solve for the module and install its merged delta, and the batches walk on. So one pass computes the
layer-sequential fixed point for any model that forward hooks can see, without a list of its blocks.

Each batch walks twice, side by side: as its task's stream (base + adapter i) and as the merged model's. Both see the
same tokens and run the same kernels on the same shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loraforge.calibrate.carriers import Carrier, make_carrier
from loraforge.calibrate.memory import share_one_heap
from loraforge.calibrate.trace import call_input
from loraforge.errors import LoraforgeError


@dataclass(slots=True, eq=False)
class Visit:
    """One batch stopped at one module.

    Attributes:
        worker: Index of the batch.
        merged: Whether this is the merged stream.
        call: Which call of the module in this forward, from 0.
        x: Input of the module, (..., d).
        y: The base module's output for x, before any delta.
    """

    worker: int
    merged: bool
    call: int
    x: Tensor
    y: Tensor


@dataclass(slots=True, eq=False)
class Deltas:
    """What the hooks of one module add: a (B, A) pair a task, and the merged one."""

    tasks: Sequence[tuple[Tensor, Tensor] | None]
    merged: tuple[Tensor, Tensor] | None = None


Visitor = Callable[[str, list[Visit]], None]
Make = Callable[[Callable[[], None]], Carrier]


class _Walker:
    """One stream of one batch on its way: its carrier, and where it stands."""

    def __init__(self, index: int, task: int, merged: bool, forward: Callable[[_Walker], None], make: Make) -> None:
        self.index, self.task, self.merged = index, task, merged
        self.calls: dict[str, int] = {}
        self.carrier = make(lambda: forward(self))
        self.visit: Visit | None = None
        self.at: str | None = None


class Lockstep:
    """Runs `model` over all batches in step.

    Args:
        model: The base model, in evaluation mode.
        modules: Target modules by name.
        deltas: What the hooks add, by module name; the visitor may set `.merged` while the batches are stopped there.
        options: Further keyword arguments of the forward.
        both_streams: Run the merged stream beside the task stream.
        make: Makes a carrier of a body.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        deltas: Mapping[str, Deltas],
        options: Mapping[str, object],
        *,
        both_streams: bool,
        make: Make = make_carrier,
    ) -> None:
        self._model, self._modules, self._deltas, self._options = model, modules, deltas, options
        self._both, self._make = both_streams, make
        self._turn: _Walker | None = None

    def run(
        self, batches: Sequence[tuple[int, Mapping[str, Tensor]]], visitor: Visitor, stops: int | None = None
    ) -> None:
        """Walks all (task, inputs) batches through the model.

        Args:
            batches: Task and model inputs of each.
            visitor: Called with a module and the batches that stand there.
            stops: How often the batches stop on their way; what the model does after the last stop (its head over the
                whole vocabulary) is then left out. None walks to the end.

        Raises:
            LoraforgeError: Batches that disagree about which module comes next (data-dependent control flow).
        """
        share_one_heap()
        self._inputs = [inputs for _, inputs in batches]
        walkers = [
            _Walker(j, task, merged, self._forward, self._make)
            for j, (task, _) in enumerate(batches)
            for merged in ((False, True) if self._both else (False,))
        ]
        handles = [m.register_forward_hook(self._hook(n), with_kwargs=True) for n, m in self._modules.items()]
        # Greenlets share one grad mode and leave their own blocks out of order: it is off around all of this.
        with torch.no_grad():
            try:
                self._advance(walkers)
                made = 0
                while not all(w.carrier.done for w in walkers):
                    name = self._meeting_point(walkers)
                    visitor(name, [w.visit for w in walkers if w.visit is not None])
                    made += 1
                    if made == stops:
                        break
                    self._advance(walkers)
            finally:
                # No thread and no activation outlives the run.
                for walker in walkers:
                    walker.carrier.stop()
                for handle in handles:
                    handle.remove()

    def _advance(self, walkers: Sequence[_Walker]) -> None:
        """Lets every batch walk to its next module, or to the end."""
        for walker in walkers:
            self._turn = walker
            walker.carrier.resume()

    def _forward(self, walker: _Walker) -> None:
        with torch.no_grad():  # a thread has a grad mode of its own
            self._model(**self._inputs[walker.index], **self._options)
        walker.at = None

    def _meeting_point(self, walkers: Sequence[_Walker]) -> str:
        places = {w.at for w in walkers}
        if len(places) != 1 or None in places:
            raise LoraforgeError(
                "the batches do not run the same modules in the same order",
                got=f"some are at {', '.join(sorted(str(p) for p in places))}",
                expected="a model whose path does not depend on its input",
                hint="routed experts cannot be calibrated; leave them out of the adapters' targets",
            )
        return str(places.pop())

    def _hook(self, name: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], y: Tensor) -> Tensor:
            walker = self._turn
            assert walker is not None  # hooks run inside a turn only
            x = call_input(args, kwargs)
            call = walker.calls.get(name, 0)
            walker.calls[name] = call + 1
            walker.at, walker.visit = name, Visit(walker.index, walker.merged, call, x, y)
            walker.carrier.pause()
            walker.visit = None
            deltas = self._deltas[name]
            pair = deltas.merged if walker.merged else deltas.tasks[walker.task]
            if pair is not None:
                B, A = pair
                y += (x @ A.mT) @ B.mT
            return y

        return hook
