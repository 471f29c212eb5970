"""Public functions of ``import dlion_mpi``: train from Python with a Keras model and arrays."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any, Literal, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from dlion_mpi.config.renamed import refusal
from dlion_mpi.errors import RunError, Stalled, UserError, in_one_line
from dlion_mpi.strategies.contract import Strategy
from dlion_mpi.wire import ValueType

P = ParamSpec("P")
R = TypeVar("R")


def rank() -> int:
    """Return this process's MPI rank, from 0, to choose its part of the data. Starts MPI with the settings of `fit`."""
    from dlion_mpi.mpi import startup

    return startup.world()[0]


def size() -> int:
    """Return the number of MPI ranks. Starts MPI with the settings of `fit`."""
    from dlion_mpi.mpi import startup

    return startup.world()[1]


OF_KERAS = ("callbacks", "epochs", "steps_per_epoch", "class_weight")
"""Arguments of `fit` that are no options of a run."""
_COMPILED: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""By model that `fit` has compiled, the optimizer that it got: a later `fit` may compile it again."""


def _fit(model: Any, train: Any, validation: Any = None, **options: Any) -> dict[str, Any]:
    """Run `fit` with the options that were given."""
    from dlion_mpi.checkpoint.start import plan
    from dlion_mpi.learner.given import shard_of_fit
    from dlion_mpi.mpi import startup
    from dlion_mpi.mpi.ranks import agreed
    from dlion_mpi.mpi.stall import limit_of
    from dlion_mpi.mpi.watching import Watched
    from dlion_mpi.run import run
    from dlion_mpi.strategies.given import options_of_strategy, refuse_texts

    callbacks, epochs, steps_per_epoch, class_weight = (options.pop(name, None) for name in OF_KERAS)
    options = {name: value for name, value in options.items() if value is not None}

    def planned() -> Any:
        refuse_texts(options)
        given = {**options, **options_of_strategy(options.get("strategy")), **_end_of(epochs, steps_per_epoch, options)}
        is_compiled = _check_compiled(model, given)
        if not given.get("resume"):  # a resumed run has these; its checkpoint knows whether the model fits
            name = re.sub(r"_\d+$", "", getattr(model, "name", type(model).__name__))  # Keras numbers what it has built
            given = {"model": name, "data": "arrays", **given}
        return is_compiled, *plan(given)

    is_compiled, config, start = agreed(planned, limit_of(options.get("stall_limit")))
    if is_compiled and "learning_rate" in options:
        model.optimizer.learning_rate = config.learning_rate
    watched = None
    if any(given is not None for given in (callbacks, epochs, steps_per_epoch)):
        watched = Watched(
            callbacks=callbacks,
            epochs=epochs,
            steps_per_epoch=steps_per_epoch,
            resume_rates="learning_rate" not in options,
        )
    try:
        done = run(
            config,
            model=model,
            own_data=lambda: shard_of_fit(train, validation, class_weight=class_weight),
            report=config.progress_every > 0,
            start=start,
            watched=watched,
        )
    except (UserError, Stalled):  # on all ranks
        raise
    except (Exception, SystemExit):
        startup.end_if_shared(1)
        raise
    if not is_compiled:
        _COMPILED[model] = model.optimizer
    if done.exit_code:
        raise RunError(str(done.summary["stopped"]), quiet=done.rank != 0, exit_code=done.exit_code)
    return done.summary if watched is None else {**done.summary, "history": watched.history}


def _end_of(epochs: Any, steps_per_epoch: Any, options: Mapping[str, Any]) -> dict[str, int]:
    """The option ``steps`` for a number of epochs; a lower limit of it if the data says how long they are.

    Raises UserError for what is no number of epochs or steps.
    """
    for name, value in (("epochs", epochs), ("steps_per_epoch", steps_per_epoch)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
            raise UserError(f"{name} {value!r}: must be a whole number, at least 1")
    if epochs is None:
        return {}
    if "steps" in options:
        raise UserError("epochs and steps exclude each other: give one of them")
    return {"steps": int(epochs) * int(steps_per_epoch or 1)}


def _check_compiled(model: Any, options: Mapping[str, Any]) -> bool:
    """Whether the user has compiled the model. Raises UserError for options that would then have no effect."""
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and _COMPILED.get(model) is optimizer:
        model.compiled = False  # by an earlier `fit`: this one does it again
    if not getattr(model, "compiled", False):
        return False
    for name in ("optimizer", "momentum"):
        if name in options:
            raise UserError(
                f"{name} has no effect with a compiled model, which has its own optimizer: drop {name}, or compile "
                "the model with it"
            )
    if "learning_rate" in options:
        inner = getattr(optimizer, "inner_optimizer", optimizer)  # of one that scales the loss
        rate = inner.get_config().get("learning_rate") if inner is not None else None
        if rate is None or isinstance(rate, dict):  # a schedule's configuration
            raise UserError(
                "learning_rate has no effect with a compiled model whose optimizer has a schedule or is its own: drop "
                "learning_rate"
            )
    return True


def _done_by(does: Callable[..., R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Give ``does`` the signature of the decorated function, for editors and `help`, and pass only the given options.

    An option that was not given is thus different from one given with its default value: a resumed run keeps its value.
    """

    def decorate(signature: Callable[P, R]) -> Callable[P, R]:
        shown = inspect.signature(signature, eval_str=True)

        @functools.wraps(signature)
        def call(*args: P.args, **options: P.kwargs) -> R:
            in_one_line()
            for name in options:
                if name not in shown.parameters:
                    known = ", ".join(sorted(shown.parameters))
                    raise UserError(refusal(name) or f"{signature.__name__}() has no option {name}; it has {known}")
            return does(*args, **options)

        call.__signature__ = shown  # type: ignore[attr-defined]
        return call

    return decorate


@_done_by(_fit)
def fit(
    model: Any,
    train: Any,
    validation: Any = None,
    *,
    callbacks: Any = None,
    epochs: int | None = None,
    steps_per_epoch: int | None = None,
    class_weight: Mapping[int, float] | None = None,
    strategy: str | Strategy | type[Strategy] = "dlion",
    preset: str | None = None,
    sync: Literal["sync", "bounded", "async"] | None = None,
    staleness: int | None = None,
    backup: int | None = None,
    patience: float | None = None,
    steps: int | None = None,
    seconds: float | None = None,
    target: str | None = None,
    evaluate_every: int | str = "20s",
    test_samples: int | None = None,
    progress: Literal["auto", "live", "lines"] = "auto",
    progress_every: float = 5.0,
    non_finite: Literal["stop", "skip"] = "stop",
    stall_limit: str | None = None,
    seed: int = 0,
    out: str | None = None,
    tensorboard: str | None = None,
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd",
    learning_rate: float = 0.05,
    momentum: float = 0.0,
    threads: int = 0,
    batch_size: int = 32,
    batching: Literal["auto", "proportional", "fixed"] | None = None,
    batch_size_max: int | None = None,
    global_batch: Literal["grow", "fixed"] | None = None,
    value_type: ValueType | None = None,
    exchange_share: float | None = None,
    transfer: Literal["all", "worse-than-mean", "worst", "none"] | None = None,
    transfer_period: int | None = None,
    transfer_merge: float | None = None,
    checkpoint_every: int | str | None = None,
    keep_checkpoints: int | None = None,
    time_limit: str | None = None,
    save_model: str | None = None,
    save_model_of: Literal["best", "mean"] | None = None,
    best: str | None = None,
    resume: str | None = None,
    requeue: bool = False,
    resume_earlier: bool = False,
) -> dict[str, Any]:
    """Train a Keras model on all MPI ranks, each with its own data. Afterwards ``model`` has the trained weights.

    - ``model``: a Keras model. A compiled model keeps its optimizer, losses and metrics: ``learning_rate`` sets the
      rate of its optimizer, and ``optimizer`` and ``momentum`` are refused. Another is compiled by these options, with
      a loss that fits.
    - ``train``: the rank's training data, as for `keras.Model.fit`: arrays or nested structures of arrays as ``(x, y)``
      or ``(x, y, sample_weight)``, a `tf.data.Dataset`, a `keras.utils.PyDataset`, a torch ``DataLoader``, a generator.
    - ``validation``: the test data, in the same form. Without it nothing is tested.
    - ``callbacks``: Keras's callbacks. At the end of an epoch all ranks give them the same logs, so that they stop and
      set the learning rate on all ranks alike. Callbacks that write files act on rank 0.
    - ``epochs``: epochs after which the run ends, in place of ``steps``.
    - ``steps_per_epoch``: steps of an epoch; by default the steps that take the training data of all ranks once.
    - ``class_weight``: the weight of each class in the loss, by its number.
    - ``strategy``: a name, a class at the top level of a module, or an instance with its own options, such as
      ``Gaia(threshold=0.2)``.
    - ``resume``: the folder of a run. It continues from its newest checkpoint with its options, except for those that
      are given here and may change.

    All others are the options of ``dlion train``. One that is left out, or None, has the default of the strategy.
    Returns the JSON object of the run, the same on every rank; with callbacks, ``epochs`` or ``steps_per_epoch`` also
    ``history``: by name the logs of all epochs. Raises UserError for a mistake in the options or the data, and RunError
    if the run failed.
    """
    raise NotImplementedError("the decorator calls _fit")
