"""k-means on a Gram matrix: distances to means of members need inner products of the points only."""

from __future__ import annotations

import torch
from torch import Tensor

from loraforge.linalg.randomized import generator


def cluster(G: Tensor, k: int, iterations: int, seed: int, word: str) -> Tensor:
    """Labels of points given by their inner products.

    Starts from k-means++ centres (Arthur and Vassilvitskii, 2007) and reassigns until nothing moves. A point at equal
    distance of two centres goes to the first; a cluster that loses its last member is dropped.

    Args:
        G: (R, R) float64 inner products; the draws follow the order of the points.
        k: Number of clusters.
        iterations: Largest number of reassignments.
        seed: Seed of the centres.
        word: What the draws are keyed by beside the seed.

    Returns:
        (R,) labels 0..c-1 on the CPU, c <= k; each point its own where R <= k. Numbered by first member.
    """
    G = G.cpu()
    count = len(G)
    if count <= k:
        return torch.arange(count)
    size = G.diagonal()
    labels = _distances_to_points(G, _first_centres(G, k, seed, word)).argmin(dim=1)
    for _ in range(iterations):
        member = torch.nn.functional.one_hot(labels).to(G.dtype)
        member = member[:, member.any(dim=0)]
        mean = member / member.sum(dim=0)
        distance = size[:, None] - 2.0 * G @ mean + (mean * (G @ mean)).sum(dim=0)
        moved = distance.argmin(dim=1)
        if torch.equal(moved, labels):
            break
        labels = moved
    seen: dict[int, int] = {}
    return torch.tensor([seen.setdefault(label, len(seen)) for label in labels.tolist()])


def _first_centres(G: Tensor, k: int, seed: int, word: str) -> list[int]:
    """Points far from each other: each drawn with probability proportional to its squared distance to the others."""
    draw = generator(seed, word)
    chosen = [int(torch.randint(len(G), (1,), generator=draw))]
    while len(chosen) < k:
        distance = _distances_to_points(G, chosen).amin(dim=1)
        # Rounding of equal points is no distance.
        distance = torch.where(distance > 1e-12 * G.diagonal().max(), distance, 0.0)
        if float(distance.sum()) == 0.0:
            break
        chosen.append(int(torch.multinomial(distance, 1, generator=draw)))
    return chosen


def _distances_to_points(G: Tensor, points: list[int]) -> Tensor:
    """(R, len(points)) squared distances."""
    return G.diagonal()[:, None] - 2.0 * G[:, points] + G.diagonal()[points]
