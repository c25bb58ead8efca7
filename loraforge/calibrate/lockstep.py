"""Many batches walk through one model in step, pausing together at every target module.

Each calibration batch runs its forward in a thread of its own, but only one thread ever moves: a baton goes round. When
a batch reaches a target module it stops there; when all have arrived, the whole calibration set's inputs of that module
lie side by side, the visitor may solve for the module and install its merged delta, and the batches walk on. So one pass
computes the layer-sequential fixed point for any model that forward hooks can see, without a list of its blocks.

A batch holds two streams as rows of one forward: the first half runs base + adapter i, the second half the merged model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from loraforge.calibrate.memory import share_one_heap
from loraforge.errors import LoraforgeError


class _Aborted(BaseException):
    """Unwinds a paused forward; never leaves this file."""


@dataclass(slots=True, eq=False)
class Visit:
    """One batch stopped at one module.

    Attributes:
        worker: Index of the batch.
        x: Input of the module, (2b, ..., d) with both streams, (b, ..., d) with the task stream alone.
        y: The base module's output for x, before any delta.
    """

    worker: int
    x: Tensor
    y: Tensor


@dataclass(slots=True, eq=False)
class Deltas:
    """What the hooks of one module add: a (B, A) pair a task, and the merged one."""

    tasks: Sequence[tuple[Tensor, Tensor] | None]
    merged: tuple[Tensor, Tensor] | None = None


Visitor = Callable[[str, list[Visit]], None]


@dataclass(slots=True, eq=False)
class _Worker:
    index: int
    task: int
    inputs: Mapping[str, Tensor]
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    at: str | None = None
    visit: Visit | None = None
    done: bool = False
    error: BaseException | None = None
    thread: threading.Thread | None = None


class Lockstep:
    """Runs `model` over all batches in step.

    Args:
        model: The base model, in evaluation mode.
        modules: Target modules by name.
        deltas: What the hooks add, by module name; the visitor may set `.merged` while the batches are stopped there.
        options: Further keyword arguments of the forward.
        both_streams: Run the merged stream beside the task stream.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        deltas: Mapping[str, Deltas],
        options: Mapping[str, object],
        *,
        both_streams: bool,
    ) -> None:
        self._model, self._modules, self._deltas, self._options = model, modules, deltas, options
        self._both = both_streams
        self._back = threading.Semaphore(0)
        self._abort = False
        self._local = threading.local()

    def run(self, batches: Sequence[tuple[int, Mapping[str, Tensor]]], visitor: Visitor) -> None:
        """Walks all (task, inputs) batches through the model.

        Raises:
            LoraforgeError: Batches that disagree about which module comes next (data-dependent control flow).
        """
        share_one_heap()
        workers = [_Worker(j, task, inputs) for j, (task, inputs) in enumerate(batches)]
        handles = [m.register_forward_hook(self._hook(n), with_kwargs=True) for n, m in self._modules.items()]
        try:
            for worker in workers:
                worker.thread = threading.Thread(target=self._forward, args=(worker,), daemon=True)
                worker.thread.start()
                self._advance(worker)
            while not all(w.done for w in workers):
                name = self._meeting_point(workers)
                visitor(name, [w.visit for w in workers if w.visit is not None])
                for worker in workers:
                    self._advance(worker)
        finally:
            self._stop(workers)
            for handle in handles:
                handle.remove()

    def _advance(self, worker: _Worker) -> None:
        """Lets one batch walk to its next module (or to the end) and takes its error, if any."""
        worker.go.release()
        self._back.acquire()
        if worker.error is not None:
            raise worker.error

    def _meeting_point(self, workers: Sequence[_Worker]) -> str:
        places = {w.at for w in workers}
        if len(places) != 1 or None in places:
            raise LoraforgeError(
                "the batches do not run the same modules in the same order",
                got=f"some are at {', '.join(sorted(str(p) for p in places))}",
                expected="a model whose path does not depend on its input",
                hint="routed experts cannot be calibrated; leave them out of the adapters' targets",
            )
        return str(places.pop())

    def _stop(self, workers: Sequence[_Worker]) -> None:
        """Unwinds every forward that is still paused, so that no thread and no activation outlives the run."""
        self._abort = True
        for worker in workers:
            if worker.thread is not None and not worker.done:
                worker.go.release()
                self._back.acquire()
        for worker in workers:
            if worker.thread is not None:
                worker.thread.join()

    def _forward(self, worker: _Worker) -> None:
        worker.go.acquire()
        self._local.worker = worker
        try:
            if not self._abort:
                inputs = worker.inputs
                if self._both:
                    inputs = {key: torch.cat([value, value]) for key, value in inputs.items()}
                with torch.no_grad():  # grad mode is per thread
                    self._model(**inputs, **self._options)
        except _Aborted:
            pass
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread, which raises it
            worker.error = error
        finally:
            worker.done, worker.at, worker.visit = True, None, None
            self._back.release()

    def _hook(self, name: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], y: Tensor) -> Tensor:
            worker: _Worker = self._local.worker
            x = args[0] if args else next(iter(kwargs.values()))
            worker.at, worker.visit = name, Visit(worker.index, x, y)
            self._back.release()
            worker.go.acquire()
            worker.visit = None
            if self._abort:
                raise _Aborted
            return self._with_deltas(name, worker.task, x, y)

        return hook

    def _with_deltas(self, name: str, task: int, x: Tensor, y: Tensor) -> Tensor:
        """Adds base + adapter i to the first half of the rows and the merged delta to the second."""
        deltas = self._deltas[name]
        half = x.shape[0] // 2 if self._both else x.shape[0]
        parts = ((deltas.tasks[task], slice(0, half)), (deltas.merged if self._both else None, slice(half, None)))
        for pair, rows in parts:
            if pair is not None:
                B, A = pair
                y[rows] += (x[rows] @ A.mT) @ B.mT
        return y
