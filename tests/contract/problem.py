"""What the contract tests train on: quadratics of which every worker knows a part, and the Configs to do it with."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from dlion_mpi.config.options import Config
from dlion_mpi.strategies.registry import STRATEGIES
from dlion_mpi.strategies.types import Effect, LocalUpdate, Sum, Sums
from dlion_mpi.vector.layout import Entries, Layout, Vector
from dlion_mpi.wire import Header, Kind, Message
from tests.inmemory import Quadratic, Run, Weather, run
from tests.options import config as options_config

LAYOUT = Layout.of([(4, 5), (7,), (), (12,)])
SIZE = LAYOUT.size
LEARNING_RATE = 0.08
OPTIMUM = np.random.default_rng(1).normal(size=SIZE).astype(np.float32)

EVERY_MODE = [(name, mode) for name, strategy in STRATEGIES.items() for mode in strategy.modes]
every_mode = pytest.mark.parametrize(("name", "mode"), EVERY_MODE)
SUMS = {name for name, strategy in STRATEGIES.items() if strategy.sums()}
"""The strategies whose workers send each other no messages, but take sums over all."""
MESSAGE_MODES = [(name, mode) for name, mode in EVERY_MODE if name not in SUMS]
every_message_mode = pytest.mark.parametrize(("name", "mode"), MESSAGE_MODES)
ROUGH = Weather(seed=5, delay=12, budget=(100, 330), blocked=0.3)


def config(name: str, mode: str, **options: Any) -> Config:
    """A Config with small periods, of those options that this strategy has."""
    small: dict[str, Any] = {"global_batch": "fixed", "h": 5}
    if options.get("transfer") != "none":
        small["transfer_period"] = 40
    if name == "hop" and mode == "bounded":  # every step, and no bound but the staleness
        small |= {"backup": 0, "max_gap": 1000, "skip": 0}
    if name == "dgc":
        small |= {"density": 0.5, "warmup": 5, "momentum": 0.5}
    if name == "demo":
        small["entries"] = 4096
    if name == "streaming-diloco":
        small |= {"fragments": 2, "alpha": 0.0, "h": 2}
    if name == "choco-sgd":
        small["density"] = 0.5
    if name == "sparseloco":
        small |= {"h": 2, "entries": 4096}
    used = {option: value for option, value in (small | options).items() if has_option(name, option)}
    return options_config(**{"strategy": name, "sync": mode, "steps": 250, "batch_size": 8, **used})


def has_option(name: str, option: str) -> bool:
    """Whether it is not a technique's option, or one of a technique that this strategy has."""
    technique = any(option in strategy.uses or hasattr(strategy.Options, option) for strategy in STRATEGIES.values())
    return not technique or option in STRATEGIES[name].uses or hasattr(STRATEGIES[name].Options, option)


def specialists(workers: int) -> list[Quadratic]:
    """Worker k has curvature only where i mod n is k: the rest it can learn from the others alone."""
    owner = np.arange(SIZE) % workers
    return [
        Quadratic(LAYOUT, np.where(owner == rank, workers, 0).astype(np.float32), LEARNING_RATE)
        for rank in range(workers)
    ]


def rows(workers: int) -> list[npt.NDArray[np.float32]]:
    return [np.tile(OPTIMUM, (16, 1))] * workers


def trained(settings: Config, workers: int = 3, weather: Weather | None = None, **options: Any) -> Run:
    return run(settings, specialists(workers), rows(workers), weather=weather, **options)


def effects_of(
    answers: Sequence[Effect | Sums[Effect | None] | None], see: Callable[[Sum], None] = lambda request: None
) -> list[Effect]:
    """The effects that the strategies of all workers have answered; their sums are taken together.

    ``see``: called with every sum that the first worker asks for. None becomes an effect that does nothing.
    """
    effects = [Effect() if answer is None else answer for answer in answers if not isinstance(answer, Generator)]
    running = [answer for answer in answers if isinstance(answer, Generator)]
    assert not (effects and running), "some workers ask for sums and some do not"
    totals: list[Any] = [None] * len(running)
    while running:
        requests, ended = [], []
        for answer, total in zip(running, totals, strict=True):
            try:
                requests.append(answer.send(total))
            except StopIteration as stop:
                ended.append(stop.value or Effect())
        if ended:
            assert not requests, "some workers ask for more sums than others"
            return ended
        see(requests[0])
        total = np.sum([request.vector for request in requests], axis=0, dtype=np.float32)
        totals = [total.copy() for _ in requests]
    return effects


def effect_of(answer: Effect | Sums[Effect | None] | None) -> Effect:
    """The effect that the strategy of the only worker has answered."""
    (effect,) = effects_of([answer])
    return effect


def local(gradient: Vector, *, step: int = 0, lbs: int = 8, gbs: int = 24) -> LocalUpdate:
    return LocalUpdate(vector=gradient, step=step, lbs=lbs, gbs=gbs)


def arrival(
    sender: int, gradient: Vector, *, lbs: int, gbs: int = 24, step: int = 0, kind: Kind = Kind.GRADIENT
) -> Message:
    """As it arrives: a whole gradient, or whole weights."""
    header = Header(kind=kind, sender=sender, epoch=0, step=step, sequence=1, acknowledged=0, lbs=lbs, gbs=gbs)
    return Message(header, Entries(SIZE, gradient))


def gradients(seed: int, steps: int, *, whole: bool) -> list[Vector]:
    """Of very different magnitudes; ``whole``: whole numbers, which float32 adds up exactly."""
    generator = np.random.default_rng(seed)
    drawn = generator.normal(size=(steps, SIZE)) * generator.choice([1e-6, 1, 1e3], size=(1, SIZE))
    return list((np.rint(drawn * 50) if whole else drawn).astype(np.float32))
