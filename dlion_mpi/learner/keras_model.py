"""A Keras model that is to be trained: its variables in groups, and what a backend needs of it.

Keras does the step: its ``train_step`` and ``test_step`` know losses, weights of samples, loss scaling, clipping and
whatever a model defines itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dlion_mpi.errors import UserError
from dlion_mpi.learner.batch import Batch
from dlion_mpi.vector.gradient import Gradient
from dlion_mpi.vector.layout import Layout, Vector
from dlion_mpi.vector.named_arrays import Array

NORMALISING = (
    "Adam",
    "Adamax",
    "Nadam",
    "RMSprop",
    "Adagrad",
    "Adadelta",
    "Adafactor",
    "Lamb",
    "Lion",
    "Muon",
)
"""Keras's optimizers, and those derived from them, whose movement has about the same length whatever the gradient's."""
SEEDS_APART = 1_000_003
"""Distance of the seeds of two ranks. torch adds a generator's seed and counter, so near seeds would give one rank the
numbers that another has had some steps before."""


class KerasModel:
    """A compiled model, its optimizers, and its variables in groups.

    ``trainable``: the variables that are trained; their entries are the *weights*, (P,). ``statistics``: other float
    variables that training changes, such as those of batch normalisation. Weights and statistics together are the
    *knowledge*, (K,). ``frozen``: float variables that training leaves alone. ``others``: integer variables, such as
    the states of random generators. A *state* is a list with the values of all non-trainable variables, in Keras's
    order. ``own_step``: whether the model has its own ``train_step``, so that no gradient can be had.
    """

    def __init__(self, model: Any, example: Batch) -> None:
        import keras

        self.model, self.example = model, example
        self.own_step = type(model).train_step is not keras.Model.train_step
        self.eager = bool(model.run_eagerly)
        _create_variables(model, example, own_step=self.own_step)
        self.trainable = list(model.trainable_variables)
        if not self.trainable:
            raise UserError("the model has no trainable variables: there is nothing to train")
        self.non_trainable = list(model.non_trainable_variables)
        moves = moving(model)
        # By place, never by path: a block that is built twice gives two variables of one path.
        kinds = [_kind(variable, id(variable) in moves) for variable in self.non_trainable]
        self.statistics_at, self.frozen_at, self.others_at = (
            [place for place, found in enumerate(kinds) if found == kind] for kind in ("statistic", "frozen", "other")
        )
        self.statistics, self.frozen, self.others = (
            [self.non_trainable[place] for place in places]
            for places in (self.statistics_at, self.frozen_at, self.others_at)
        )
        self.optimizers = _optimizers(model)
        if not self.own_step and not model.optimizer.built:
            model.optimizer.build(self.trainable)
        self.layout = Layout.of([v.shape for v in self.trainable])
        self.knowledge_layout = Layout.of([v.shape for v in (*self.trainable, *self.statistics)])

    @property
    def slots(self) -> list[Any]:
        """The optimizers' variables. With the model's own ``train_step`` they may come with the first step."""
        return [variable for optimizer in self.optimizers for variable in optimizer.variables]

    @property
    def averages(self) -> list[Any]:
        """The optimizer's averages of the weights, which `finish` puts in their place."""
        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        if self.own_step or not getattr(optimizer, "use_ema", False):
            return []
        return [variable for variable in optimizer._model_variables_moving_average if variable is not None]

    @property
    def loss_scale(self) -> Any:
        """The optimizer if it scales the loss, else None."""
        import keras

        optimizer = self.model.optimizer
        return optimizer if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) else None

    def is_overflow(self, found: Gradient) -> bool:
        """Whether a gradient is not finite because the loss was scaled too far."""
        return self.loss_scale is not None and math.isfinite(found.loss) and not found.finite

    def state(self, statistics: Sequence[Any], state: Sequence[Any]) -> list[Any]:
        """A state with these values of the statistics, and the others of ``state``."""
        replaced = dict(zip(self.statistics_at, statistics, strict=True))
        return [replaced.get(place, value) for place, value in enumerate(state)]

    def data(self, batch: Batch) -> Any:
        """A batch as ``train_step`` takes it."""
        import keras

        return keras.utils.pack_x_y_sample_weight(*batch)

    def training_loss(self, batch: Batch) -> Any:
        """The loss of a batch, with all that the model adds to it; for a gradient."""
        model = self.model
        outputs = model(batch.x, training=True) if model._call_has_training_arg else model(batch.x)
        return model._compute_loss(
            x=batch.x, y=batch.y, y_pred=outputs, sample_weight=batch.sample_weight, training=True
        )

    def plain_rate(self) -> np.float32 | None:
        """The learning rate of an optimizer that does no more than ``w - rate g``, else None."""
        optimizer = self.model.optimizer
        if self.own_step or type(optimizer).__name__ != "SGD":
            return None
        config = optimizer.get_config()
        rate = config.get("learning_rate")
        if not isinstance(rate, float | np.floating):
            return None
        plain = type(optimizer)(rate).get_config() | {"name": config["name"]}
        return np.float32(rate) if config == plain and not self.constrained and self._all_float32() else None

    @property
    def normalises(self) -> bool:
        """Whether every optimizer is one of Keras's that divide a gradient by its usual size."""
        import keras

        kinds = tuple(getattr(keras.optimizers, name) for name in NORMALISING)
        found = [part for optimizer in self.optimizers for part in _parts(optimizer)]
        return bool(found) and all(isinstance(part, kinds) for part in found)

    @property
    def constrained(self) -> list[Any]:
        """The trainable variables with a constraint."""
        return [v for v in self.trainable if getattr(v, "constraint", None) is not None]

    def describe(self) -> str:
        """Shapes of all variables and the optimizers' classes, to tell one model from another."""
        shapes = [list(v.shape) for v in (*self.trainable, *self.statistics, *self.others)]
        return ", ".join([f"{shapes}", *(type(optimizer).__name__ for optimizer in self.optimizers)])

    def finish(self) -> None:
        """Put in the weights what the optimizers keep for the end, such as their averages."""
        if not self.own_step:
            self.model.optimizer.finalize_variable_values(self.trainable)

    def _all_float32(self) -> bool:
        return all(v.dtype == "float32" for v in self.trainable)


def facts(keras_model: KerasModel) -> str:
    """Facts that must be the same on all ranks, one a line: variables, optimizers, loss.

    Names of layers are left out, since Keras numbers them by what a process has built before.
    """
    model = keras_model.model
    groups = ("trainable", "statistics", "frozen", "others")
    counts = ", ".join(f"{len(getattr(keras_model, group))} {group}" for group in groups)
    lines = [f"class {type(model).__name__}", f"variables: {counts}"]
    for title in groups:
        for number, variable in enumerate(getattr(keras_model, title)):
            lines.append(f"{title} variable {number} ({variable.name}): {tuple(variable.shape)} {variable.dtype}")
    for optimizer in keras_model.optimizers:
        lines.append(f"optimizer: {type(optimizer).__name__}")
        config = optimizer.get_config()
        lines += [f"optimizer's {name}: {_words(value)}" for name, value in config.items() if name != "name"]
    loss = getattr(model, "loss", None)
    lines.append(f"loss: {_words(loss) if loss is not None else 'of the model itself'}")
    return "\n".join(lines)


def check_alike(facts_by_rank: Sequence[str]) -> None:
    """Raise UserError unless all ranks have built the same model: it names the first difference."""
    first = facts_by_rank[0].split("\n")
    for rank, text in enumerate(facts_by_rank):
        own = text.split("\n")
        for k in range(max(len(own), len(first)) if text != facts_by_rank[0] else 0):
            here, there = (lines[k] if k < len(lines) else "nothing more" for lines in (own, first))
            if here != there:
                raise UserError(
                    f"rank {rank} has another model than rank 0. Rank {rank}: {here}. Rank 0: {there}. Build and "
                    "compile it alike on all ranks"
                )


def value_for_rank(variable: Any, rank: int) -> Array:
    """The variable's value on this rank. A random generator's state (seed, counter) gets a seed of the rank's own.

    Ranks start from equal weights, but must not drop the same units.
    """
    value = numbers(variable)
    if variable.name == "seed_generator_state" and value.shape == (2,) and value.dtype.kind in "iu":
        value += np.array([rank * SEEDS_APART % 2**31, 0]).astype(value.dtype)
    return value


def numbers(variable: Any) -> Array:
    """A copy of a variable's value."""
    import keras

    value: Array = keras.ops.convert_to_numpy(variable.value)
    return value.copy()


def flat(parts: Sequence[Any]) -> Vector:
    """Arrays as one vector of float32."""
    if not parts:
        return np.empty(0, np.float32)
    return np.concatenate([np.ravel(np.asarray(part)).astype(np.float32, copy=False) for part in parts])


def _create_variables(model: Any, example: Batch, *, own_step: bool) -> None:
    """Build what Keras builds before the first step: layers, metrics, losses."""
    shapes = example.map(np.asarray)
    try:
        model._symbolic_build(data_batch=(shapes.x, shapes.y, shapes.sample_weight))
    except Exception:
        if not own_step:  # its own `train_step` need not call the model
            raise


def moving(model: Any) -> set[int]:
    """The identities of variables that their layers created as non-trainable, and that are not frozen with them."""
    return {id(v) for layer in _layers(model) if layer.trainable for v in layer._non_trainable_variables}


def _layers(model: Any) -> Iterator[Any]:
    yield from model._flatten_layers()


def _kind(variable: Any, moving: bool) -> str:
    if "float" not in variable.dtype:
        return "other"
    return "statistic" if moving else "frozen"


def _optimizers(model: Any) -> list[Any]:
    """The optimizer that the model was compiled with, and those of its attributes, also in lists and dicts."""
    import keras

    found: dict[int, Any] = {}

    def search(thing: Any) -> None:
        if isinstance(thing, keras.optimizers.Optimizer):
            found[id(thing)] = thing
        elif isinstance(thing, Mapping | list | tuple):
            for item in thing.values() if isinstance(thing, Mapping) else thing:
                search(item)

    search([model.optimizer, *vars(model).values()])
    return list(found.values())


def _parts(optimizer: Any) -> Iterator[Any]:
    """The optimizers inside one that wraps others, or itself."""
    inside = [getattr(optimizer, "inner_optimizer", None), *getattr(optimizer, "optimizers", ())]
    wrapped = [inner for inner in inside if inner is not None]
    if not wrapped:
        yield optimizer
    for inner in wrapped:
        yield from _parts(inner)


def _words(thing: Any) -> str:
    """A short text of a configuration that is the same for equal ones in every process."""
    import keras

    if isinstance(thing, dict):
        return "{" + ", ".join(f"{key}: {_words(value)}" for key, value in thing.items() if key != "name") + "}"
    if isinstance(thing, list | tuple):
        return "[" + ", ".join(_words(item) for item in thing) + "]"
    if isinstance(thing, float | np.floating):
        return f"{float(thing):.6g}"
    if isinstance(thing, str | int | bool) or thing is None:
        return str(thing)
    if isinstance(thing, keras.losses.Loss | keras.optimizers.schedules.LearningRateSchedule):
        return f"{type(thing).__name__} {_words(thing.get_config())}"
    return getattr(thing, "__name__", type(thing).__name__)
