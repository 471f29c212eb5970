"""All rows, in the order of the table."""

from __future__ import annotations

from tests.keras_rows import data, layers, losses, models, optimizers, own_steps

ROWS = [row for file in (layers, models, own_steps, losses, optimizers, data) for row in file.ROWS.rows]
BY_NAME = {row.name: row for row in ROWS}
