"""Workers whose strategies send each other messages, as bytes, and apply what comes: a step at a time, in lockstep."""

from __future__ import annotations

from typing import Any

import numpy as np

from dlion_mpi.config.options import Config
from dlion_mpi.strategies.contract import Strategy
from dlion_mpi.strategies.registry import resolve
from dlion_mpi.strategies.types import Effect, LinkView, Outbox, Plan
from dlion_mpi.vector.layout import Layout, Vector
from dlion_mpi.wire import Header, Message, capacity_bytes, decode, encode
from tests.contract.problem import local
from tests.options import full_names


class Exchanging:
    """The strategies of ``n`` workers, and their weights; an optimizer is ``w - gradient``."""

    def __init__(self, name: str, n: int, layout: Layout, start: float = 0.0, **options: Any) -> None:
        config = Config.of(full_names({"strategy": name, **options}))
        self.layout, self.step = layout, 0
        self.strategies: list[Strategy] = []
        self.states: list[Any] = []
        for rank in range(n):
            strategy, resolved = resolve(config)
            self.strategies.append(strategy)
            self.states.append(strategy.start(Plan(config=resolved, rank=rank, ranks=tuple(range(n)), layout=layout)))
        self.weights = [np.full(layout.size, start, np.float32) for _ in range(n)]
        self.bytes: list[dict[int, int]] = []
        """By worker and peer, the bytes of the newest step's messages."""
        self.sent: list[Outbox] = []
        """By worker, the newest step's messages."""

    def advance(self, vectors: list[Vector], lbs: list[int] | None = None) -> list[Effect]:
        """One step of all, given their gradients or movements. Returns the effects, which have been applied."""
        sizes = lbs or [8] * len(vectors)
        own = [
            local(v.astype(np.float32), step=self.step, lbs=size, gbs=sum(sizes))
            for v, size in zip(vectors, sizes, strict=True)
        ]
        arrived: list[list[Message]] = [[] for _ in own]
        self.sent, self.bytes = [], []
        for rank, (strategy, state, update) in enumerate(zip(self.strategies, self.states, own, strict=True)):
            links = {peer: LinkView(True, 1e9) for peer in range(len(own)) if peer != rank}
            first = strategy.before_compute(state, self.step, self.weights[rank].copy, links)
            self.sent.append(first | strategy.outgoing(state, update, links))
            self.bytes.append({})
            for peer, message in self.sent[rank].items():
                header = Header(kind=message.kind, sender=rank, epoch=0, step=self.step, sequence=1, acknowledged=0)
                buffer = np.empty(capacity_bytes(self.layout.size), np.uint8)
                length = encode(header, message.entries, buffer, message.value_type)
                arrived[peer].append(decode(buffer[:length].copy(), size=self.layout.size))
                self.bytes[rank][peer] = length
        effects = []
        for rank, (strategy, state, update) in enumerate(zip(self.strategies, self.states, own, strict=True)):
            effect = strategy.incoming(state, update, self.weights[rank].copy, arrived[rank])
            assert isinstance(effect, Effect)
            if effect.weights is not None:
                self.weights[rank] = effect.weights.copy()
            if effect.movement is not None:
                self.weights[rank] = self.weights[rank] + effect.movement
            if effect.gradient is not None:
                self.weights[rank] = self.weights[rank] - effect.gradient
            after = strategy.between(state, update, self.weights[rank].copy)
            assert after is None or isinstance(after, Effect)
            if after is not None and after.weights is not None:
                self.weights[rank] = after.weights.copy()
            effects.append(effect)
        self.step += 1
        return effects

    def resumed(self, **options: Any) -> Exchanging:
        """The same workers after a checkpoint: new ones with the state that is kept, and the weights."""
        again = Exchanging(self.strategies[0].name, len(self.states), self.layout, **options)
        for rank, strategy in enumerate(self.strategies):
            kept = {name: np.array(value) for name, value in strategy.to_arrays(self.states[rank]).items()}
            again.strategies[rank].from_arrays(again.states[rank], kept)
            again.weights[rank] = self.weights[rank].copy()
        again.step = self.step
        return again


def drawn(seed: int, n: int, size: int) -> list[Vector]:
    """Normal vectors, one per worker."""
    return list(np.random.default_rng(seed).normal(size=(n, size)).astype(np.float32))
