"""The form of a message: what it captures is predicted, and the best within a budget is chosen."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from dlion_mpi.algorithms.error_feedback import Budget, Residuals, Rules
from dlion_mpi.algorithms.forms import ALL, EXACT, FEW, USUAL, Form, Terms, best, forms
from dlion_mpi.algorithms.selection import Selection, Selector
from dlion_mpi.vector.layout import Layout, Vector
from dlion_mpi.wire import ValueType, encoded_bytes

LAYOUT = Layout.of([(200, 500), (500,), (40, 500), (3, 3, 8, 16)])
SCALES = (1.0, 5.0, 0.2, 2.0)


def by_variable(draw: Callable[[np.random.Generator, int], np.ndarray], seed: int = 4) -> Vector:
    """Random entries of variables of different magnitudes."""
    rng = np.random.default_rng(seed)
    parts = [scale * draw(rng, part.stop - part.start) for scale, part in zip(SCALES, LAYOUT.segments(), strict=True)]
    return np.concatenate(parts).astype(np.float32)


VECTORS = {
    "flat": by_variable(lambda rng, n: rng.choice([-1.0, 1.0], n) * rng.uniform(0.7, 1.0, n)),
    "normal": by_variable(lambda rng, n: rng.normal(size=n)),
    "laplace": by_variable(lambda rng, n: rng.laplace(size=n)),
    "heavy": by_variable(lambda rng, n: rng.standard_t(2.5, size=n)),
    "mostly zero": by_variable(lambda rng, n: rng.normal(size=n) * (rng.random(n) < 0.05)),
}


def sent(
    vector: Vector, value_type: ValueType | None, budget_bytes: float, few_bytes: float = 1e9
) -> tuple[Form, float]:
    """The form that is predicted to be best, and the share of the energy that the message brought."""
    selector = Selector(LAYOUT)
    types = None if value_type is None else (value_type,)
    terms = Terms(budget_bytes, few_bytes, types, n_min=1e-6, clustering=1.0)
    form = best(forms(selector, vector, selector.measure(vector), terms))
    memory = Residuals(LAYOUT, Rules(max_n=None, n_min=1e-6, value_type=value_type, few_bytes=few_bytes))
    memory.add(vector)
    choice = memory.take({1: Budget(budget_bytes, budget_bytes)})[1]
    assert choice.value_type == form.value_type
    assert encoded_bytes(choice.entries.indices, LAYOUT.size, choice.value_type) <= budget_bytes
    left = np.square(memory.common, dtype=np.float64).sum()
    return form, 1 - float(left / max(1e-30, np.square(vector, dtype=np.float64).sum()))


@pytest.mark.parametrize("share", [0.003, 0.01, 0.04, 0.1, 0.3])
@pytest.mark.parametrize("value_type", [*ALL, EXACT, None])
@pytest.mark.parametrize("kind", VECTORS)
def test_what_a_message_brings_is_predicted_within_a_tenth(
    kind: str, value_type: ValueType | None, share: float
) -> None:
    form, brought = sent(VECTORS[kind], value_type, share * 4 * LAYOUT.size)
    assert form.captured == pytest.approx(brought, rel=0.1, abs=0.01)


@pytest.mark.parametrize("share", [0.003, 0.01, 0.04, 0.1, 0.3])
@pytest.mark.parametrize("kind", VECTORS)
def test_no_other_form_brings_much_more(kind: str, share: float) -> None:
    vector, budget_bytes = VECTORS[kind], share * 4 * LAYOUT.size
    _, chosen = sent(vector, None, budget_bytes)
    for value_type in {*FEW, *ALL}:
        assert sent(vector, value_type, budget_bytes)[1] <= USUAL * chosen + 0.03


def test_flat_vectors_go_as_signs_and_a_few_large_entries_as_they_are() -> None:
    budget_bytes = 0.033 * 4 * LAYOUT.size
    flat, _ = sent(VECTORS["flat"], None, budget_bytes)
    assert (flat.value_type, flat.selection.indices) == ("sign", None)
    large = np.zeros(LAYOUT.size, np.float32)
    large[::1000] = np.random.default_rng(1).lognormal(0, 3, len(large[::1000]))
    exact, brought = sent(large, None, budget_bytes)
    assert exact.value_type == "bfloat16"
    assert exact.selection.indices is not None
    assert brought > 0.999


@pytest.mark.parametrize(
    ("share", "value_type"), [(0.04, "sign"), (0.07, "int2"), (0.14, "int4"), (0.27, "int8"), (0.6, "bfloat16")]
)
def test_wide_links_carry_all_entries_with_as_many_bits_as_help(share: float, value_type: str) -> None:
    form, _ = sent(VECTORS["normal"], None, share * 4 * LAYOUT.size, few_bytes=0.01 * 4 * LAYOUT.size)
    assert (form.value_type, form.selection.indices) == (value_type, None)


def test_of_two_forms_that_are_level_the_smaller_is_taken() -> None:
    whole = Selection(None, 100.0)
    found = [Form(whole, "bfloat16", 200.0, 1.0), Form(whole, "int8", 100.0, 0.9995), Form(whole, "int4", 50.0, 0.99)]
    assert best(found).value_type == "int8"


def test_a_vector_of_zeros_is_no_obstacle() -> None:
    form, _ = sent(np.zeros(LAYOUT.size, np.float32), None, 1e4)
    assert form.captured == 0
