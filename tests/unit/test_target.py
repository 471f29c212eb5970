"""Targets: how they are written, which direction counts, and when the workers together reach one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlion_mpi.config.target import Target, falls
from dlion_mpi.errors import UserError
from dlion_mpi.metrics.names import best_metric, check_names, check_same, column_of, main_metric, metric_of
from dlion_mpi.metrics.records import Evaluation
from dlion_mpi.metrics.targets import reached_s

HALF = Target("accuracy", ">=", 0.5)


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("accuracy>=0.8", Target("accuracy", ">=", 0.8)),
        (" val_loss <= 3e-1 ", Target("val_loss", "<=", 0.3)),
        ("precision at 0.9>=0.5", Target("precision at 0.9", ">=", 0.5)),
        ("r2>=-1", Target("r2", ">=", -1.0)),
    ],
)
def test_a_target_is_read(text: str, target: Target) -> None:
    assert Target.parse(text) == target
    assert Target.parse(str(target)) == target


@pytest.mark.parametrize(
    "text", ["", "0.8", "accuracy", "accuracy>0.8", ">=0.8", "accuracy>=", "accuracy=>0.8", "mae<=nan", "mae<=inf"]
)
def test_what_is_no_target_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not a metric and a bound"):
        Target.parse(text)


def test_an_accuracy_is_no_percentage() -> None:
    with pytest.raises(UserError, match="from 0 to 1"):
        Target.parse("top_5_accuracy>=95")
    assert Target.parse("mae<=95").value == 95


def test_the_direction_counts_and_the_bound_itself_is_enough() -> None:
    at_least, at_most = Target("x", ">=", 0.5), Target("x", "<=", 0.5)
    assert [at_least.reached(value) for value in (0.4, 0.5, 0.6, float("nan"))] == [False, True, True, False]
    assert [at_most.reached(value) for value in (0.4, 0.5, 0.6, float("nan"))] == [True, True, False, False]


@pytest.mark.parametrize(
    ("metric", "less_is_better"),
    [
        *((name, True) for name in ("val_loss", "mean_absolute_error", "mae", "dice_loss", "perplexity", "rmse")),
        *((name, True) for name in ("false_positives", "kl_divergence", "accuracy_loss", "previous")),
        *((name, False) for name in ("accuracy", "sparse_categorical_accuracy", "acc", "auc", "auc_1", "AUC", "auc2")),
        *((name, False) for name in ("precision", "f1_score", "r2_score", "mean_io_u", "true_positives", "ROC-AUC")),
        *((name, False) for name in ("cosine_similarity", "out_accuracy", "recall_at_precision", "mean_reward")),
    ],
)
def test_which_direction_is_better(metric: str, less_is_better: bool) -> None:
    assert falls(metric) == less_is_better


def test_the_main_metric_is_an_accuracy_if_there_is_one() -> None:
    assert main_metric(["val_loss", "a_accuracy", "accuracy"]) == "accuracy"
    assert main_metric(["mae", "val_loss", "out_acc"]) == "out_acc"
    assert main_metric(["mae", "val_loss"]) == "val_loss"
    assert main_metric(["mae"]) == "mae"
    assert main_metric([]) is None


def test_the_best_worker_is_told_by_loss_unless_another_metric_is_named() -> None:
    assert best_metric(None, ["accuracy", "val_loss"]) == "val_loss"
    assert best_metric("auc", ["auc", "val_loss"]) == "auc"
    assert best_metric(None, []) is None


@given(st.text(min_size=1))
def test_any_name_has_a_column_of_its_own(name: str) -> None:
    column = column_of(name)
    assert metric_of(column) == name
    assert "/" not in column
    assert "\0" not in column
    assert column.strip(".")


# ---- names are checked before the first step


def test_a_metric_that_the_model_lacks_is_refused_with_the_list() -> None:
    names = ("val_loss", "auc")
    check_names(names, Target("auc", ">=", 0.5), "val_loss")
    with pytest.raises(UserError, match=r"accuracy>=0\.5: the model has no metric accuracy; it has val_loss, auc"):
        check_names(names, HALF, None)
    with pytest.raises(UserError, match="--best mae: the model has no metric mae; it has val_loss, auc"):
        check_names(names, None, "mae")
    with pytest.raises(UserError, match=r"--target accuracy>=0\.5: nothing is tested without validation data"):
        check_names((), HALF, None)
    with pytest.raises(UserError, match="a metric named time_s"):
        check_names(("val_loss", "time_s"), None, None)
    check_names((), None, None)


def test_ranks_that_test_different_metrics_are_refused() -> None:
    check_same(["val_loss\naccuracy"] * 3)
    check_same(["", ""])
    with pytest.raises(UserError, match="rank 0 tests val_loss, accuracy, rank 2 val_loss: compile"):
        check_same(["val_loss\naccuracy", "val_loss\naccuracy", "val_loss"])
    with pytest.raises(UserError, match="rank 0 tests nothing, rank 1 val_loss:"):
        check_same(["", "val_loss"])


# ---- when the target was reached


def worker(*evaluations: tuple[float, float]) -> list[Evaluation]:
    """Evaluations with these times and accuracies; the loss tells the opposite."""
    return [Evaluation(k, time_s, {"val_loss": -a, "accuracy": a}) for k, (time_s, a) in enumerate(evaluations)]


@pytest.mark.parametrize(
    ("workers", "expected"),
    [
        ([worker((1, 0.5), (2, 0.8), (3, 0.9))], 2),
        ([worker((1, 0.9)), worker((2, 0.6), (5, 0.7))], 5),  # (0.9 + 0.6) / 2 is not enough
        ([worker((1, 0.9)), worker()], None),  # one was never tested
        ([worker((1, 0.9), (4, 0.7)), worker((2, 0.6), (5, 0.9))], 5),
        ([worker((1, 0.9), (2, 0.1)), worker((3, 0.7))], None),
        ([worker((1, 0.9), (2, 0.1)), worker((1.5, 0.7))], 1.5),  # reached, if not kept
        ([worker((1, 0.7))], None),
        ([worker()], None),
    ],
)
def test_it_is_when_the_mean_of_everyone_s_latest_gets_there(
    workers: list[list[Evaluation]], expected: float | None
) -> None:
    assert reached_s(workers, Target("accuracy", ">=", 0.8)) == expected


def test_without_a_target_there_is_no_time() -> None:
    assert reached_s([worker((1, 1.0))], None) is None


def test_exactly_the_target_is_reached() -> None:
    assert reached_s([worker((1, 0.75)), worker((2, 0.25))], HALF) == 2


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 50), st.integers(0, 4)), max_size=6, unique_by=lambda e: e[0]).map(sorted),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([0.25, 0.5, 0.75]),
)
def test_by_definition(tests: list[list[tuple[int, int]]], target: float) -> None:
    """The first moment at which everyone has been tested and the mean of the latest accuracies is enough."""
    expected = None
    for now in range(51):
        latest = [[accuracy / 4 for at, accuracy in own if at <= now][-1:] for own in tests]
        if expected is None and all(latest) and sum(a for (a,) in latest) / len(tests) >= target:
            expected = now
    # Tests of one instant count one after the other, so that it may be reached in between.
    workers = [worker(*((float(at), a / 4) for at, a in own)) for own in tests]
    found = reached_s(workers, Target("accuracy", ">=", target))
    instants = [at for own in tests for at, _ in own]
    if len(set(instants)) == len(instants):
        assert found == expected
    else:
        assert expected is None or (found is not None and found <= expected)


def test_a_loss_is_reached_from_above_and_is_not_the_accuracy() -> None:
    falling = [Evaluation(k, float(k), {"accuracy": 0.0, "val_loss": 3.0 - k}) for k in range(4)]
    slower = [Evaluation(k, k + 0.5, {"accuracy": 0.0, "val_loss": 4.0 - k}) for k in range(4)]
    assert reached_s([falling], Target("val_loss", "<=", 1.0)) == 2.0
    assert reached_s([falling, slower], Target("val_loss", "<=", 1.0)) == 3.0  # (0 + 2) / 2
    assert reached_s([falling], Target("val_loss", ">=", 1.0)) == 0.0
    assert reached_s([falling], Target("auc", "<=", 1.0)) is None
