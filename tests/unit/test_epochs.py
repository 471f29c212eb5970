"""The length of a run that is given in epochs."""

from __future__ import annotations

import math

import pytest

from dlion_mpi.config.options import Config
from dlion_mpi.errors import UserError
from dlion_mpi.mpi.watching import Watched
from dlion_mpi.vector.named_arrays import Arrays, integers, under


def steps(epochs: int | None, samples: int | None = 100, step: int = 0, saved: Arrays | None = None) -> float:
    config = Config(batch_size=8, global_batch="fixed", target=None, seconds=5.0)
    return Watched(epochs=epochs).with_steps(config, 2, samples, step, saved or {}).last_step


def test_an_epoch_is_the_training_set_once() -> None:
    assert steps(3) == 3 * 7
    assert steps(2000) == 2000 * 7


def test_epochs_get_shorter_as_the_global_batch_grows() -> None:
    config = Config(batch_size=8, global_batch="grow")
    assert Watched(epochs=3).with_steps(config, 2, 8000, 0, {}).steps == 500 + math.ceil(8000 / 48) * 2


def test_a_resumed_run_continues_with_its_epoch() -> None:
    saved = under("epochs", integers(epoch=1, end=20))
    assert steps(3, step=17, saved=saved) == 27
    assert steps(1, step=13, saved=saved) == 13, "they are over"
    assert steps(2, step=17) == 17 + 14, "of a run without epochs"


def test_where_rows_are_not_counted_an_epoch_has_no_end() -> None:
    with pytest.raises(UserError, match="the number of training rows is unknown: give steps_per_epoch"):
        steps(3, None)
    with pytest.raises(UserError, match="the number of training rows is unknown: give steps_per_epoch"):
        steps(None, None)
    assert steps(None) == math.inf
