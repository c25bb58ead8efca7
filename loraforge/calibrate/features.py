"""The counted rows of a module's inputs, out of the batches that stand there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from loraforge.calibrate.batches import Batch
from loraforge.calibrate.lockstep import Deltas, Visit
from loraforge.calibrate.statistics import Sums
from loraforge.calibrate.trace import Trace
from loraforge.calibrate.weights import Collecting, Rows
from loraforge.errors import LoraforgeError
from loraforge.kernels.covariance import cov_pack


class Features:
    """Takes padding out of the inputs, mixes the streams and measures the outputs.

    Modules that are fed by the very same tensor get the same packed rows, and share their Grams.

    Args:
        modules: Target modules by name.
        deltas: What the hooks add.
        trace: Leaders and masks.
        how: What is collected.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], deltas: Mapping[str, Deltas], trace: Trace, how: Collecting
    ) -> None:
        self._modules, self._deltas, self._trace, self._how = modules, deltas, trace, how
        self._batches: Sequence[Batch] = ()
        self._both = True
        self._leader = ""
        self._packed: list[tuple[Tensor, Tensor]] = []
        self._sums: dict[tuple[int, int], Sums] = {}

    def start(self, batches: Sequence[Batch], both_streams: bool) -> None:
        """Before a walk: which batches stand behind the visits, and whether the merged stream runs."""
        self.stop()
        self._batches, self._both = batches, both_streams

    def stop(self) -> None:
        """After a walk: lets go of all activations."""
        self._batches, self._leader, self._packed, self._sums = (), "", [], {}

    def rows(self, name: str, visits: Sequence[Visit]) -> list[Rows]:
        """The rows of all batches, in their order."""
        found = []
        for visit, (X, Xm) in zip(visits, self.pack(name, visits), strict=True):
            batch = self._batches[visit.worker]
            energy = self._output_energy(name, visit, X) if self._how.lambda_weight == "full" else 0.0
            found.append(Rows(batch.task, batch.fold, X, Xm, energy))
        return found

    def shared(self, name: str) -> dict[tuple[int, int], Sums] | None:
        """Where the Grams of this module's input are kept for the others that it feeds; None if it feeds no other.

        Sample weights differ by module, and so do weighted Grams: those are never shared.
        """
        leader = self._trace.leaders[name]
        feeds = sum(other == leader for other in self._trace.leaders.values())
        return self._sums if feeds > 1 and self._how.weighting is None and self._trace.calls[name] == 1 else None

    def pack(self, name: str, visits: Sequence[Visit]) -> list[tuple[Tensor, Tensor]]:
        """Per batch (X, X~), both (t, d), float32 or float64; one tensor where the task stream runs alone."""
        leader = self._trace.leaders[name]
        if leader == self._leader and self._trace.calls[name] == 1:
            return self._packed
        self._leader, self._sums, self._packed = leader, {}, []
        for visit in visits:
            mask = self._mask(name, visit)
            x = visit.x.reshape(-1, visit.x.shape[-1])
            dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
            half = x.shape[0] // (2 if self._both else 1)
            X = cov_pack(x[:half], mask, None, dtype)
            if not self._both:
                self._packed.append((X, X))
                continue
            Xm = cov_pack(x[half:], mask, None, dtype)
            if self._how.rho:
                Xm = torch.lerp(Xm, X, self._how.rho)
            self._packed.append((X, Xm))
        return self._packed

    def _mask(self, name: str, visit: Visit) -> Tensor | None:
        """(rows of one stream,) bool: which rows count; None where all do.

        Raises:
            LoraforgeError: The module sees another number of rows than the mask has.
        """
        batch = self._batches[visit.worker]
        rows = visit.x.numel() // visit.x.shape[-1] // (2 if self._both else 1)
        mask = {"encoder": batch.enc_mask, "decoder": batch.dec_mask, "all": None}[self._trace.axis[name]]
        if mask is None or (mask.numel() == rows and bool(mask.all())):
            return None
        if mask.numel() != rows:
            raise LoraforgeError(
                "the rows of a module cannot be told from padding",
                where=name,
                got=f"{rows} rows for a mask of {tuple(mask.shape)}",
                hint="use samples of one length without padding (safetensors calibration, all attention_mask 1)",
            )
        return mask.reshape(-1)

    def _output_energy(self, name: str, visit: Visit, X: Tensor) -> float:
        """||X W_i^T||_F^2 of task model i: the base module's output less its bias, plus the adapter's."""
        mask = self._mask(name, visit)
        y = visit.y.reshape(-1, visit.y.shape[-1])
        y = y[: y.shape[0] // (2 if self._both else 1)]
        output = cov_pack(y, mask, None, X.dtype)
        bias = getattr(self._modules[name], "bias", None)
        pair = self._deltas[name].tasks[self._batches[visit.worker].task]
        # `y` itself goes on through the model: the first change makes a copy, the others work in it.
        output = output.clone() if bias is None else output - bias.to(X.dtype)
        if pair is not None:
            output.addmm_(X @ pair[1].to(X.dtype).mT, pair[0].to(X.dtype).mT)
        return float(torch.linalg.vector_norm(output)) ** 2
