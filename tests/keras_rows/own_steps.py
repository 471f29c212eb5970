"""Models with a `train_step` of their own, written for each backend as Keras's guides do it."""

from __future__ import annotations

from typing import Any

import keras
from keras import layers, ops

from tests.keras_rows import made
from tests.keras_rows.nets import sgd
from tests.keras_rows.row import Rows, arrays

ROWS = Rows("models")
BACKEND = keras.backend.backend()


class VariationalAutoencoder(keras.Model):
    """Encoder, sampling, decoder; the step tracks two losses."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = layers.Dense(2 * 3), layers.Dense(12, activation="sigmoid")
        self.seeds = keras.random.SeedGenerator(4)
        self.total = keras.metrics.Mean(name="loss")
        self.divergence = keras.metrics.Mean(name="divergence")

    @property
    def metrics(self) -> list[Any]:
        return [self.total, self.divergence]

    def call(self, x: Any, training: bool = False) -> Any:
        mean, log_variance = ops.split(self.encoder(x), 2, 1)
        z = mean
        if training:
            z = mean + ops.exp(0.5 * log_variance) * keras.random.normal(ops.shape(mean), seed=self.seeds)
        return self.decoder(z), mean, log_variance

    def losses_of(self, x: Any, results: Any) -> tuple[Any, Any]:
        """The loss, and the divergence that is a part of it."""
        decoded, mean, log_variance = results
        divergence = -0.5 * ops.mean(1 + log_variance - ops.square(mean) - ops.exp(log_variance))
        return ops.mean(keras.losses.binary_crossentropy(x, decoded)) + divergence, divergence

    def tracked(self, loss: Any, divergence: Any) -> dict[str, Any]:
        """Metrics after one more batch."""
        self.total.update_state(loss)
        self.divergence.update_state(divergence)
        return {metric.name: metric.result() for metric in self.metrics}


class ForTensorFlow(VariationalAutoencoder):
    """A step with a gradient tape."""

    def train_step(self, data: Any) -> Any:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            found = self.losses_of(data[0], self(data[0], training=True))
        gradients = tape.gradient(found[0], self.trainable_weights)
        self.optimizer.apply(gradients, self.trainable_weights)
        return self.tracked(*found)

    def test_step(self, data: Any) -> Any:
        return self.tracked(*self.losses_of(data[0], self(data[0])))


class ForTorch(VariationalAutoencoder):
    """A step with `backward`."""

    def train_step(self, data: Any) -> Any:
        import torch

        loss, divergence = self.losses_of(data[0], self(data[0], training=True))
        self.zero_grad()
        loss.backward()
        weights = self.trainable_weights
        with torch.no_grad():
            self.optimizer.apply([v.value.grad for v in weights], weights)
        return self.tracked(loss, divergence)

    def test_step(self, data: Any) -> Any:
        return self.tracked(*self.losses_of(data[0], self(data[0])))


class ForJax(VariationalAutoencoder):
    """A step that takes and returns the state."""

    def train_step(self, state: Any, data: Any) -> Any:
        import jax

        def loss_of(trainable: Any, others: Any) -> Any:
            results, others = self.stateless_call(trainable, others, data[0], training=True)
            loss, divergence = self.losses_of(data[0], results)
            return loss, (divergence, others)

        trainable, others, slots, tracked = state
        (loss, (divergence, others)), gradients = jax.value_and_grad(loss_of, has_aux=True)(trainable, others)
        trainable, slots = self.optimizer.stateless_apply(slots, gradients, trainable)
        logs, tracked = self._tracked(tracked, loss, divergence)
        return logs, (trainable, others, slots, tracked)

    def test_step(self, state: Any, data: Any) -> Any:
        trainable, others, tracked = state
        results, others = self.stateless_call(trainable, others, data[0])
        logs, tracked = self._tracked(tracked, *self.losses_of(data[0], results))
        return logs, (trainable, others, tracked)

    def _tracked(self, values: Any, loss: Any, divergence: Any) -> tuple[Any, Any]:
        logs, after = {}, []
        for metric, found in zip(self.metrics, (loss, divergence), strict=True):
            own, values = values[: len(metric.variables)], values[len(metric.variables) :]
            own = metric.stateless_update_state(own, found)
            logs[metric.name] = metric.stateless_result(own)
            after += own
        return logs, after


@ROWS.add("your own `train_step` (a variational autoencoder)", made.themselves())
def own_train_step() -> Any:
    model = {"tensorflow": ForTensorFlow, "torch": ForTorch, "jax": ForJax}[BACKEND]()
    model.compile(keras.optimizers.Adam(0.01))
    return model


class Adversaries(keras.Model):
    """A generator and a discriminator with an optimizer each, as in Keras's DCGAN example."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = keras.Sequential([keras.Input((3,)), layers.Dense(8, activation="tanh"), layers.Dense(12)])
        self.discriminator = keras.Sequential([keras.Input((12,)), layers.Dense(8, activation="tanh"), layers.Dense(1)])
        self.seeds = keras.random.SeedGenerator(4)
        self.built = BACKEND == "torch"  # Keras asks for it there

    def compile(self, discriminator: Any, generator: Any) -> None:
        super().compile()
        self.d_optimizer, self.g_optimizer = discriminator, generator
        self.loss_of = keras.losses.BinaryCrossentropy(from_logits=True)
        self.measured = keras.metrics.Mean(name="d_loss"), keras.metrics.Mean(name="g_loss")

    @property
    def metrics(self) -> list[Any]:
        return list(self.measured)

    def discriminator_loss(self, x: Any) -> Any:
        """Loss of telling real rows from made ones."""
        noise = keras.random.normal((ops.shape(x)[0], 3), seed=self.seeds)
        guesses = self.discriminator(ops.concatenate([self.generator(noise), x]))
        real = ops.concatenate([ops.zeros_like(x[:, :1]), ops.ones_like(x[:, :1])])
        return self.loss_of(real, guesses)

    def generator_loss(self, x: Any) -> Any:
        """Loss of making rows that look real."""
        noise = keras.random.normal((ops.shape(x)[0], 3), seed=self.seeds)
        return self.loss_of(ops.ones_like(x[:, :1]), self.discriminator(self.generator(noise)))

    def train_step(self, data: Any) -> Any:
        x = data[0] if isinstance(data, tuple) else data
        d_metric, g_metric = self.measured
        d_metric.update_state(self._improve(self.discriminator_loss, x, self.discriminator, self.d_optimizer))
        g_metric.update_state(self._improve(self.generator_loss, x, self.generator, self.g_optimizer))
        return {metric.name: metric.result() for metric in self.measured}

    def _improve(self, loss_of: Any, x: Any, part: Any, optimizer: Any) -> Any:
        weights = part.trainable_weights
        if BACKEND == "torch":
            import torch

            self.zero_grad()
            loss = loss_of(x)
            loss.backward()
            with torch.no_grad():
                optimizer.apply([v.value.grad for v in weights], weights)
            return loss
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = loss_of(x)
        optimizer.apply(tape.gradient(loss, weights), weights)
        return loss


@ROWS.add(
    "two optimizers in one `train_step` (a GAN)",
    arrays(made.without_targets, validated=False),
    backends=("tensorflow", "torch"),
    note="Keras's JAX step keeps the state of one optimizer",
)
def adversarial() -> Any:
    model = Adversaries()
    model.compile(keras.optimizers.Adam(0.01), sgd())
    return model
