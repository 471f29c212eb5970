"""A strategy's state in a checkpoint, by default: the fields of its dataclass as named arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dlion_mpi.strategies.types import Plan
from dlion_mpi.vector.named_arrays import (
    Array,
    Arrays,
    array,
    integer,
    integers,
    integers_by_rank,
    part,
    under,
    vector,
    vectors_by_rank,
)


@dataclass(slots=True)
class State:
    """The state of a strategy that keeps nothing, and the base class of all others."""

    plan: Plan


@runtime_checkable
class Kept(Protocol):
    """A part of a state that defines how it is kept, such as `missed.Missed`."""

    def to_arrays(self) -> Arrays:
        """The kept arrays by name."""

    def from_arrays(self, arrays: Mapping[str, Array], name: str, ranks: Iterable[int]) -> None:
        """Restore what `to_arrays` gave, stored under ``name``. Raises StateError."""


def transient() -> Any:
    """Declare a field of a state that is not kept: a buffer, or what follows from the plan."""
    return dataclasses.field(metadata={"transient": True})


def to_arrays(state: State) -> Arrays:
    """The fields of ``state`` that are kept: arrays, integers, dictionaries of either by rank, and `Kept` parts.

    A field that is None is left out. Raises TypeError for a field of any other type.
    """
    arrays: Arrays = {}
    for name, value in _kept_fields(state):
        if isinstance(value, np.ndarray):
            arrays[name] = value
        elif isinstance(value, int):
            arrays |= integers(**{name: value})
        elif isinstance(value, dict):
            arrays |= under(name, {rank: np.asarray(entry) for rank, entry in value.items()})
        elif isinstance(value, Kept):
            arrays |= under(name, value.to_arrays())
        elif value is not None:
            raise TypeError(f"field {name} of its state is a {type(value).__name__}, which a checkpoint cannot keep")
    return arrays


def from_arrays(state: State, arrays: Mapping[str, Array]) -> None:
    """Restore what `to_arrays` gave into a new state. Raises StateError."""
    plan = state.plan
    for name, value in _kept_fields(state):
        if isinstance(value, np.ndarray):
            value[...] = array(arrays, name, value.dtype, *value.shape)
        elif isinstance(value, int):
            setattr(state, name, integer(arrays, name))
        elif isinstance(value, dict):
            are_integers = all(entry.ndim == 0 for entry in part(arrays, name).values())
            value |= (
                integers_by_rank(arrays, name, plan.ranks)
                if are_integers
                else vectors_by_rank(arrays, name, plan.ranks, plan.layout.size)
            )
        elif isinstance(value, Kept):
            value.from_arrays(arrays, name, plan.ranks)
        elif name in arrays:
            setattr(state, name, vector(arrays, name, plan.layout.size))


def _kept_fields(state: State) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(state):
        if field.name != "plan" and not field.metadata.get("transient"):
            yield field.name, getattr(state, field.name)
