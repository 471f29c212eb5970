"""What every test of whole programs needs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.system import launch


@pytest.fixture(autouse=True)
def _nothing_is_left_running() -> Iterator[None]:
    yield
    launch.end_all()
