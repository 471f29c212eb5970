"""Deep Gradient Compression: momentum correction, selection, clipping and warm-up, against a calculation by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlion_mpi.errors import UserError
from dlion_mpi.strategies.dgc import Dgc, clipped, density
from dlion_mpi.vector.layout import Layout
from tests.contract.exchanging import Exchanging, drawn

LAYOUT = Layout.of([(10, 30), (30,), (5, 4, 2), ()])
KERNELS = [slice(0, 300), slice(330, 370)]
DENSE = np.r_[300:330, 370:371]
PLAIN: dict[str, Any] = {"warmup": 0}


@given(seed=st.integers(0, 100), n=st.integers(2, 4), momentum=st.sampled_from([0.0, 0.9]), steps=st.integers(1, 6))
def test_it_is_the_published_algorithm(seed: int, n: int, momentum: float, steps: int) -> None:
    """In float64 and without the shared code: m, v, the largest tenth of each kernel, masks, biases, the mean."""
    workers = Exchanging("dgc", n, LAYOUT, density=0.1, momentum=momentum, **PLAIN)
    m, v, w = np.zeros((n, LAYOUT.size)), np.zeros((n, LAYOUT.size)), np.zeros(LAYOUT.size)
    for step in range(steps):
        gradients = drawn(100 * step + seed, n, LAYOUT.size)
        workers.advance(gradients)
        for k in range(n):
            m[k] = momentum * m[k] + gradients[k] / n
            v[k] += m[k]
            sent = [DENSE]
            for kernel in KERNELS:
                order = np.argsort(-np.abs(v[k][kernel]))[: (kernel.stop - kernel.start) // 10] + kernel.start
                m[k][order] = 0
                sent.append(order)
            places = np.concatenate(sent)
            w[places] -= v[k][places]
            v[k][places] = 0
        for k in range(n):
            np.testing.assert_allclose(workers.states[k].accumulated, v[k], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(workers.states[k].momentum, m[k], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(workers.weights[k], w, rtol=1e-4, atol=1e-5)
            assert workers.weights[k].tobytes() == workers.weights[0].tobytes()


@pytest.mark.parametrize("value_type", ["float32", "bfloat16", "sign"])
def test_without_momentum_what_was_sent_and_what_is_kept_is_what_was_computed(value_type: str) -> None:
    """Rounding errors are kept as well."""
    workers = Exchanging("dgc", 3, LAYOUT, density=0.05, momentum=0.0, value_type=value_type, **PLAIN)
    total = np.zeros(LAYOUT.size)
    for step in range(12):
        gradients = drawn(step, 3, LAYOUT.size)
        workers.advance(gradients, lbs=[8, 16, 8])
        total += (8 * gradients[0] + 16 * gradients[1] + 8 * gradients[2]) / 32
    kept = sum(state.accumulated for state in workers.states)
    assert np.abs(kept).max() > 0.1
    np.testing.assert_allclose(kept - workers.weights[0], total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("share", "entries"), [(0.001, 1 + 1), (0.1, 30 + 4), (0.33, 99 + 14), (1.0, 340)])
def test_each_kernel_sends_its_share_and_vectors_all(share: float, entries: int) -> None:
    workers = Exchanging("dgc", 2, LAYOUT, density=share, **PLAIN)
    workers.advance(drawn(1, 2, LAYOUT.size))
    message = workers.sent[0][1]
    assert message.entries is not None
    assert len(message.entries) == entries + len(DENSE)
    assert message.quality == pytest.approx(100 * (entries + 31) / 371)


def test_the_density_falls_in_the_warm_up() -> None:
    seen = [density(0.001, 10, step) for step in (0, 9, 10, 20, 30, 39, 40, 1000)]
    assert seen == [0.25, 0.25, 0.0625, 0.015625, 0.00390625, 0.00390625, 0.001, 0.001]
    assert density(0.001, 0, 0) == 0.001
    assert density(0.5, 10, 0) == 0.5, "a density above that of the warm-up has none"
    workers = Exchanging("dgc", 2, LAYOUT, warmup=2)
    sizes = []
    for step in range(10):
        workers.advance(drawn(step, 2, LAYOUT.size))
        sizes.append(workers.bytes[0][1])
    assert sizes[0] == sizes[1] > sizes[2] == sizes[3] > sizes[4] > sizes[8] == sizes[9]


def test_a_gradient_is_clipped_to_its_part_of_the_joint_norm() -> None:
    vector = np.array([3, 4], np.float32)
    np.testing.assert_allclose(clipped(vector, 1.0), [0.6, 0.8])
    np.testing.assert_array_equal(clipped(vector, 0.0), vector)
    np.testing.assert_array_equal(clipped(vector, 6.0), vector)
    workers = Exchanging("dgc", 4, LAYOUT, clip=0.5, density=1.0, momentum=0.0, **PLAIN)
    gradients = [np.zeros(LAYOUT.size, np.float32) for _ in range(4)]
    for k, gradient in enumerate(gradients):
        gradient[k] = 100.0
    workers.advance(gradients)
    np.testing.assert_allclose(workers.weights[0][:4], -0.25)  # of norm 0.5 together


def test_a_resumed_worker_continues_with_the_same_bits() -> None:
    options = {"density": 0.1, "warmup": 3}
    whole = Exchanging("dgc", 2, LAYOUT, **options)
    for step in range(5):
        whole.advance(drawn(step, 2, LAYOUT.size))
    again = whole.resumed(**options)
    assert whole.strategies[0].to_arrays(whole.states[0]).keys() == {"momentum", "accumulated"}
    for step in range(4):
        for workers in (whole, again):
            workers.advance(drawn(50 + step, 2, LAYOUT.size))
        assert whole.weights[1].tobytes() == again.weights[1].tobytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"density": 0}, "--dgc.density 0: must be in "),
        ({"density": 1.5}, "--dgc.density 1.5: must be in "),
        ({"momentum": 1}, "--dgc.momentum 1: must be in "),
        ({"clip": -1}, "--dgc.clip -1: must be at least 0"),
        ({"warmup": -1}, "--dgc.warmup -1: must be at least 0"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Dgc(**options)
