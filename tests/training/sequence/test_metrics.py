from __future__ import annotations

import random

import pytest

from loraforge.errors import InputProblems, LoraforgeError
from loraforge.training.sequence.metrics import NAMES, cl_metrics, row_metrics
from tests.oracles import ilora as oracle

MATRIX = [[0.80, 0.30, 0.20], [0.60, 0.70, 0.25], [0.50, 0.65, 0.90]]
BASE = [0.25, 0.28, 0.22]


def test_values_of_a_matrix_worked_out_by_hand() -> None:
    found = cl_metrics(MATRIX, BASE, [0.85, 0.75, 0.90])
    assert found == pytest.approx(
        {
            "acc": 0.683333, "avg": 0.711111, "bwt": -0.175, "forgetting": 0.175, "fwt": 0.025, "learning_acc": 0.80,
            "intransigence": 0.033333,
        },
        abs=1e-6,
    )  # fmt: skip


def test_a_gain_and_then_a_loss_show_in_both_directions() -> None:
    found = cl_metrics([[0.5, 0.1, 0.1], [0.8, 0.6, 0.1], [0.7, 0.6, 0.6]])
    # Transfer compares with the day of learning, forgetting with the best day: they are not each other's negative.
    assert found["bwt"] == pytest.approx(0.10) and found["forgetting"] == pytest.approx(0.05)


def test_the_last_row_is_no_part_of_the_best() -> None:
    assert cl_metrics([[0.5, 0.0], [0.7, 0.9]])["forgetting"] == pytest.approx(-0.2)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_equals_the_oracle_on_random_matrices(count: int) -> None:
    rng = random.Random(count)
    matrix = [[rng.random() for _ in range(count)] for _ in range(count)]
    base, single = ([rng.random() for _ in range(count)] for _ in range(2))
    wanted = oracle.cl_metrics(matrix, base, single)
    found = cl_metrics(matrix, base, single)
    names = {"learning_acc": "learning"}
    assert found == pytest.approx({name: wanted[names.get(name, name)] for name in NAMES})


def test_one_task_has_no_transfer_and_no_forgetting() -> None:
    found = cl_metrics([[0.7]], [0.2])
    assert [found[name] for name in ("bwt", "forgetting", "fwt", "intransigence")] == [None] * 4
    assert found["acc"] == found["avg"] == found["learning_acc"] == 0.7


def test_scores_of_later_tasks_may_be_missing_but_then_there_is_no_forward_transfer() -> None:
    found = cl_metrics([[0.8, None], [0.6, 0.7]], BASE[:2])
    assert found["fwt"] is None and found["bwt"] == pytest.approx(-0.2)


def test_a_missing_score_is_an_error_and_never_zero() -> None:
    with pytest.raises(LoraforgeError, match="score on task 1 after task 2 is missing"):
        cl_metrics([[0.8, 0.1], [None, 0.7]])
    with pytest.raises(InputProblems) as caught:
        cl_metrics([[float("nan"), 0.1], [None, 0.7]])
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("matrix", [[], [[0.1, 0.2]], [[0.1, 0.2], [0.3]]])
def test_a_matrix_that_is_not_square_is_refused(matrix: list[list[float]]) -> None:
    with pytest.raises(LoraforgeError, match="empty|another length"):
        cl_metrics(matrix)


def test_methods_without_an_order_have_a_mean_alone() -> None:
    joint, single = row_metrics([0.5, 0.9]), row_metrics([0.5, 0.9], own=True)
    assert joint["acc"] == single["acc"] == single["learning_acc"] == pytest.approx(0.7)
    assert joint["learning_acc"] is None and joint["bwt"] is single["bwt"] is None
    with pytest.raises(LoraforgeError, match="missing"):
        row_metrics([0.5, None])
