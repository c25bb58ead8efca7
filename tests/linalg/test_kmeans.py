from __future__ import annotations

import torch

from loraforge.linalg.kmeans import cluster


def points(groups: int, each: int, spread: float) -> torch.Tensor:
    g = torch.Generator().manual_seed(4)
    centres = 10 * torch.randn(groups, 5, generator=g, dtype=torch.float64)
    return (centres[:, None] + spread * torch.randn(groups, each, 5, generator=g, dtype=torch.float64)).reshape(-1, 5)


def test_separate_groups_are_found_whatever_the_seed() -> None:
    X = points(4, 6, 0.1)
    want = torch.arange(4).repeat_interleave(6)
    for seed in range(10):
        assert torch.equal(cluster(X @ X.T, 4, 10, seed, "m"), want)


def test_every_point_ends_at_its_nearest_mean() -> None:
    X = points(6, 5, 6.0)
    labels = cluster(X @ X.T, 4, 100, 1, "m")
    means = torch.stack([X[labels == c].mean(dim=0) for c in range(int(labels.max()) + 1)])
    assert torch.equal(torch.cdist(X, means).argmin(dim=1), labels)


def test_few_or_equal_points() -> None:
    X = points(3, 1, 0.0)
    assert cluster(X @ X.T, 3, 10, 0, "m").tolist() == [0, 1, 2] == cluster(X @ X.T, 9, 10, 0, "m").tolist()
    X = points(2, 4, 0.0)
    assert cluster(X @ X.T, 5, 10, 0, "m").tolist() == [0] * 4 + [1] * 4
    zero = torch.zeros(4, 3, dtype=torch.float64)
    assert cluster(zero @ zero.T, 2, 10, 0, "m").tolist() == [0] * 4


def test_draws_are_keyed_and_leave_the_global_generator_alone() -> None:
    X = points(9, 4, 5.0)
    G = X @ X.T
    state = torch.random.get_rng_state()
    assert torch.equal(cluster(G, 5, 0, 1, "m"), cluster(G, 5, 0, 1, "m"))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not all(torch.equal(cluster(G, 5, 0, 1, "m"), cluster(G, 5, 0, s, w)) for s, w in ((2, "m"), (1, "n")))
