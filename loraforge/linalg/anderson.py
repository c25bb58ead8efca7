"""Type-II Anderson mixing of a fixed-point iteration W <- G(W) (the document's MATS).

    R_k = G(W_k) - W_k,   gamma = argmin ||R_k - dR gamma||^2 + reg ||gamma||^2,
    W_{k+1} = G(W_k) - sum_j gamma_j (G(W_{j+1}) - G(W_j)),   dR_j = R_{j+1} - R_j over the last m + 1 iterates.

Cost of a step on P unknowns, in passes over P numbers: 11 to enter the iterate into the rings, m + 2 each for the new
column of dR^T dR and of dG^T dG (the guard's; none without a guard), m + 2 for the mix. One read by the host.

Source: Walker and Ni, SIAM J. Numer. Anal. 49 (2011); the IterIS++ document, section 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loraforge.kernels.anderson import anderson_dots, anderson_mix
from loraforge.kernels.checks import FLOAT32_64, require


@dataclass(slots=True, eq=False)
class _Rings:
    """The last m + 1 iterates: the newest as it is, each older one as its difference to the next.

    Differences are taken once, of the numbers themselves. Taken of their dot products instead (D G D^T of the Gram G of
    the residuals) they would lose everything once |dR| < 1e-8 |R|, as a history that stands still has it.

    Attributes:
        images: (m + 1, P) G(W_new) in row `newest`, dG_j in the others.
        residuals: (m + 1, P) R_new and dR_j.
        normal: (m + 1, m + 1) float64 on the CPU: dR_i . dR_j by row.
        travel: (m + 1, m + 1) the same of dG.
        right: (m + 1,) dR_j . R_new.
        filled: Rows that hold something; they fill in order.
        newest: Row of the newest iterate.
    """

    images: Tensor
    residuals: Tensor
    normal: Tensor
    travel: Tensor
    right: Tensor
    filled: int = 0
    newest: int = -1

    @classmethod
    def like(cls, state: Tensor, rows: int) -> _Rings:
        """Empty rings for states of this length, dtype and device."""
        shape = (rows, state.shape[0])
        square, line = torch.zeros(rows, rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64)
        return cls(state.new_empty(shape), state.new_empty(shape), square, square.clone(), line)

    def push(self, state: Tensor, image: Tensor) -> int:
        """Enters an iterate over the oldest one and turns its predecessor into a difference, without a temporary.

        Returns:
            Row of that difference; -1 for the first iterate.
        """
        rows, before = self.images.shape[0], self.newest
        self.newest = (before + 1) % rows
        self.filled = max(self.filled, self.newest + 1)
        self.images[self.newest].copy_(image)
        torch.sub(image, state, out=self.residuals[self.newest])
        if before >= 0:
            for ring in (self.images, self.residuals):
                torch.sub(ring[self.newest], ring[before], out=ring[before])
        return before

    def by_age(self) -> list[int]:
        """Rows of the differences, oldest first."""
        rows = self.images.shape[0]
        return [(self.newest - back) % rows for back in range(self.filled - 1, 0, -1)]

    def enter(self, row: int, dots: Tensor, travel: Tensor | None) -> None:
        """Takes in the dot products of the difference in `row` with all rows.

        The older dR_j . R_new move on by dR_j . dR_row, since R_new = R_before + dR_row.

        Args:
            row: Row of the newest difference.
            dots: (filled,) float64: dR_row . every row of `residuals`.
            travel: (filled,) the same of `images`, or None where nobody asks.
        """
        live = self.by_age()
        older = [j for j in live if j != row]
        self.right[older] += dots[older]
        self.right[row] = dots[self.newest]
        self.normal[row, live] = self.normal[live, row] = dots[live]
        if travel is not None:
            self.travel[row, live] = self.travel[live, row] = travel[live]


@dataclass
class AndersonMixer:
    """Anderson mixing over flat states of length P.

    Attributes:
        history_size: m, the number of differences kept.
        regularization: Tikhonov term; relative to trace(dR^T dR) / m, or absolute.
        reg_mode: "relative" or "absolute".
        growth: A mixed state further than `growth` x ||G|| from G is dropped for G itself (0: no guard).
    """

    history_size: int = 5
    regularization: float = 1e-6
    reg_mode: str = "relative"
    growth: float = 2.0
    _rings: _Rings | None = field(default=None, repr=False, compare=False)

    def reset(self) -> None:
        """Forgets all iterates and lets go of their memory."""
        self._rings = None

    def step(self, state: Tensor, image: Tensor) -> Tensor:
        """The next state.

        Args:
            state: (P,) W_k, float32 or float64; copied.
            image: (P,) G(W_k), same dtype; copied.

        Returns:
            (P,) W_{k+1}; `image` itself while there is no history, where the guard drops the mixture, and where an
            iterate is not finite.

        Raises:
            LoraforgeError: The shapes or dtypes differ, from each other or from those since the last reset.
        """
        known = self._rings
        if known is None:
            require("AndersonMixer", "state", state, ("P",), FLOAT32_64)
            self._rings = known = _Rings.like(state, self.history_size + 1)
        ring = known.images
        require("AndersonMixer", "state", state, (ring.shape[1],), (ring.dtype,))
        require("AndersonMixer", "image", image, (ring.shape[1],), (ring.dtype,))
        row = known.push(state, image)
        if row < 0 or self.history_size == 0:
            return image
        size = self._measure(known, row)
        live = known.by_age()
        if size is None:
            self.reset()
            return image
        gamma = self._gamma(known.normal[live][:, live], known.right[live])
        if self.growth and self._runs_away(gamma, known.travel[live][:, live], size):
            self.reset()
            return image
        weights = torch.zeros(known.filled, dtype=torch.float64)
        weights[live], weights[known.newest] = -gamma, 1.0
        mixed, images = torch.empty_like(known.images[0]), known.images[: known.filled]
        # G_j = W_j + R_j stands in the ring ready made: given twice with beta 0, memory is read once.
        anderson_mix(images, images, weights.to(image.device, non_blocking=True), 0.0, mixed)
        return mixed

    def _measure(self, rings: _Rings, row: int) -> float | None:
        """Enters the products of the newest difference, in one transfer to the host.

        Returns:
            ||G_new|| for the guard (0 without one); None where an iterate is not finite.
        """
        n = rings.filled
        found = [anderson_dots(rings.residuals[:n], rings.residuals[row])[:n]]
        if self.growth:
            found.append(anderson_dots(rings.images[:n], rings.images[row])[:n])
            found.append(torch.linalg.vector_norm(rings.images[rings.newest])[None].double())
        on_host = torch.cat(found).cpu()
        if not bool(torch.isfinite(on_host).all()):
            return None
        rings.enter(row, on_host[:n], on_host[n : 2 * n] if self.growth else None)
        return float(on_host[-1]) if self.growth else 0.0

    def _runs_away(self, gamma: Tensor, travel: Tensor, size: float) -> bool:
        """Whether ||mixed - G|| > growth ||G||, known before anything is mixed: its square is gamma^T dG^T dG gamma."""
        return math.sqrt(max(float(gamma @ travel @ gamma), 0.0)) > self.growth * size

    def _gamma(self, normal: Tensor, right: Tensor) -> Tensor:
        """(m,) float64 solution of the regularised normal equations."""
        shift = self.regularization
        if self.reg_mode == "relative":
            shift *= float(normal.diagonal().mean())
        regularised = normal + shift * torch.eye(normal.shape[0], dtype=normal.dtype)
        # Least squares: two equal iterates make the system singular when the shift is zero.
        return torch.linalg.lstsq(regularised, right[:, None], driver="gelsd").solution[:, 0]
