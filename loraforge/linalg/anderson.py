"""Type-II Anderson mixing of a fixed-point iteration W <- G(W) (the document's MATS).

    R_k = G(W_k) - W_k,   gamma = argmin ||R_k - dR gamma||^2 + reg ||gamma||^2,
    W_{k+1} = G(W_k) - sum_j gamma_j (G(W_{j+1}) - G(W_j)),   dR_j = R_{j+1} - R_j over the last m + 1 iterates.

Source: Walker and Ni, SIAM J. Numer. Anal. 49 (2011); the IterIS++ document, section 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from loraforge.kernels.anderson import anderson_dots, anderson_mix


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
    _states: list[Tensor] = field(default_factory=list)
    _residuals: list[Tensor] = field(default_factory=list)

    def reset(self) -> None:
        """Forgets all iterates."""
        self._states.clear()
        self._residuals.clear()

    def step(self, state: Tensor, image: Tensor) -> Tensor:
        """The next state.

        Args:
            state: (P,) W_k.
            image: (P,) G(W_k), same dtype.

        Returns:
            (P,) W_{k+1}; `image` itself while there is no history.
        """
        self._states.append(state)
        self._residuals.append(image - state)
        del self._states[: -(self.history_size + 1)]
        del self._residuals[: -(self.history_size + 1)]
        m = len(self._states) - 1
        if m == 0:
            return image
        residuals = torch.stack(self._residuals)
        gamma = self._gamma(residuals[1:] - residuals[:-1], residuals[-1])
        # In terms of the iterates G_j = W_j + R_j: a_0 = gamma_0, a_j = gamma_j - gamma_{j-1}, a_m = 1 - gamma_{m-1}.
        padded = torch.cat([gamma.new_zeros(1), gamma, gamma.new_ones(1)])
        mixed = torch.empty_like(image)
        anderson_mix(torch.stack(self._states), residuals, padded[1:] - padded[:-1], 1.0, mixed)
        if self.growth and float((mixed - image).norm()) > self.growth * float(image.norm()):
            self.reset()
            return image
        return mixed

    def _gamma(self, differences: Tensor, residual: Tensor) -> Tensor:
        """(m,) float64 solution of the regularised least squares on (m, P) differences and a (P,) residual."""
        m = differences.shape[0]
        rhs = anderson_dots(differences, residual)[:m]
        normal = torch.stack([anderson_dots(differences, differences[j])[:m] for j in range(m)])
        shift = self.regularization
        if self.reg_mode == "relative":
            shift *= float(normal.diagonal().mean())
        regularised = normal + shift * torch.eye(m, dtype=normal.dtype, device=normal.device)
        # Least squares: two equal iterates make the system singular when the shift is zero.
        return torch.linalg.lstsq(regularised.cpu(), rhs.cpu()[:, None], driver="gelsd").solution[:, 0].to(rhs.device)
