"""Rows of docs/what-trains.md, trained on two ranks, against plain Keras on the same batches.

All rows share a job of two ranks. KERAS_BACKEND chooses the backend. The usual run leaves out what another row stands
for: most losses and optimizers, and on JAX and torch most rows. DLION_TEST_ROWS=all trains all.
"""

from __future__ import annotations

import os

import pytest

from tests.keras_rows.row import Row
from tests.keras_rows.rows import ROWS
from tests.keras_rows.runner import Result, results

TIME_LIMIT_S = 840
FEW = {"dense", "batch-norm", "dropout", "several-outputs", "own-train-step", "optimizer-adam", "data-loader"}
MORE = {"reduction-none", "reduction-sum", "binary", "multi-label", "label-smoothing", "segmentation", "language-model"}
MORE |= {
    f"optimizer-{name}" for name in ("momentum", "adamw", "ema", "clip-norm", "accumulation", "schedule", "loss-scale")
}
ALL = os.environ.get("DLION_TEST_ROWS") == "all"
ON_TENSORFLOW = os.environ.get("KERAS_BACKEND", "tensorflow") == "tensorflow"
pytestmark = pytest.mark.timeout(TIME_LIMIT_S + 60)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, Result]:
    """Results of the rows that are selected, all of one job unless a row ends it."""
    rows = [item.callspec.params.get("row") for item in request.session.items if hasattr(item, "callspec")]
    names = [row.name for row in rows if isinstance(row, Row) and not _is_left_out(row)]
    return results(names, tmp_path_factory.mktemp("rows"), TIME_LIMIT_S)


def _is_left_out(row: Row) -> bool:
    if ALL or row.name in FEW:
        return False
    return not ON_TENSORFLOW or (row.group in ("losses", "optimizers") and row.name not in MORE)


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_a_row_trains_as_plain_keras_does(row: Row, found: dict[str, Result]) -> None:
    if _is_left_out(row):
        pytest.skip("another row stands for it: DLION_TEST_ROWS=all trains it too")
    result = found[row.name]
    if result.skipped:
        pytest.skip(result.skipped)
    assert not result.error
