"""Optimizers, and what Keras puts round them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import optimizers

from tests.keras_rows import made
from tests.keras_rows.nets import compiled, perceptron
from tests.keras_rows.row import Rows

ROWS = Rows("optimizers")

MADE: dict[str, tuple[str, Callable[[], Any]]] = {
    "sgd": ("`SGD`", lambda: optimizers.SGD(0.1)),
    "momentum": ("`SGD` with momentum", lambda: optimizers.SGD(0.1, momentum=0.9)),
    "nesterov": ("`SGD` with Nesterov's momentum", lambda: optimizers.SGD(0.1, momentum=0.9, nesterov=True)),
    "rmsprop": ("`RMSprop`", lambda: optimizers.RMSprop(0.01, momentum=0.5, centered=True)),
    "adam": ("`Adam`", lambda: optimizers.Adam(0.01)),
    "amsgrad": ("`Adam` with AMSGrad", lambda: optimizers.Adam(0.01, amsgrad=True)),
    "adamw": ("`AdamW`", lambda: optimizers.AdamW(0.01, weight_decay=0.1)),
    "adamax": ("`Adamax`", lambda: optimizers.Adamax(0.01)),
    "nadam": ("`Nadam`", lambda: optimizers.Nadam(0.01)),
    "adagrad": ("`Adagrad`", lambda: optimizers.Adagrad(0.05)),
    "adadelta": ("`Adadelta`", lambda: optimizers.Adadelta(1.0)),
    "adafactor": ("`Adafactor`", lambda: optimizers.Adafactor(0.05)),
    "ftrl": ("`Ftrl`", lambda: optimizers.Ftrl(0.1, l1_regularization_strength=0.001)),
    "lion": ("`Lion`", lambda: optimizers.Lion(0.01)),
    "lamb": ("`Lamb`", lambda: optimizers.Lamb(0.01)),
    "muon": ("`Muon`", lambda: optimizers.Muon(0.01)),
    "schedule-free": ("`ScheduleFreeAdamW`", lambda: optimizers.ScheduleFreeAdamW(0.01, warmup_steps=2)),
    "by-name": ("by name", lambda: "adam"),
    "ema": (
        "`use_ema`: averages replace the weights at the end",
        lambda: optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5),
    ),
    "ema-overwrite": (
        "`ema_overwrite_frequency`",
        lambda: optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2),
    ),
    "clip-norm": ("`clipnorm`", lambda: optimizers.SGD(0.5, clipnorm=0.1)),
    "clip-value": ("`clipvalue`", lambda: optimizers.SGD(0.5, clipvalue=0.01)),
    "clip-global-norm": ("`global_clipnorm`", lambda: optimizers.Adam(0.01, global_clipnorm=0.1)),
    "weight-decay": ("`weight_decay`", lambda: optimizers.SGD(0.1, weight_decay=0.1)),
    "accumulation": (
        "`gradient_accumulation_steps`",
        lambda: optimizers.SGD(0.1, momentum=0.9, gradient_accumulation_steps=2),
    ),
    "schedule": ("a learning rate schedule", lambda: optimizers.SGD(optimizers.schedules.CosineDecay(0.2, 4))),
    "loss-scale": (
        "`LossScaleOptimizer`",
        lambda: optimizers.LossScaleOptimizer(optimizers.SGD(0.1), initial_scale=1024.0, dynamic_growth_steps=2),
    ),
}


def _add(name: str, text: str, make: Callable[[], Any]) -> None:
    def build() -> Any:
        return compiled(perceptron(), make())

    build.__name__ = f"optimizer_{name}"
    ROWS.add(text, made.vectors())(build)


for _name, (_text, _make) in MADE.items():
    _add(_name, _text, _make)


@ROWS.add("your own optimizer", made.vectors())
def own_optimizer() -> Any:
    class Sign(keras.optimizers.Optimizer):
        def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
            self.assign_sub(variable, keras.ops.cast(learning_rate, variable.dtype) * keras.ops.sign(gradient))

    return compiled(perceptron(), Sign(0.01))


@ROWS.add("`MultiOptimizer`: one for biases, one for the others", made.vectors())
def multi_optimizer() -> Any:
    def chosen(variable: Any) -> Any:
        return optimizers.Adam(0.01) if variable.name == "bias" else optimizers.SGD(0.1)

    return compiled(perceptron(), optimizers.MultiOptimizer(chosen))
