"""Kinds of layers."""

from __future__ import annotations

from typing import Any

import keras
from keras import layers

from tests.keras_rows import made
from tests.keras_rows.nets import classifier, compiled
from tests.keras_rows.row import Rows, training

ROWS = Rows("layers")
row = ROWS.add


@row("`Dense`", made.vectors())
def dense() -> Any:
    return classifier((12,), layers.Dense(8, activation="tanh"))


@row("`EinsumDense`, `PReLU`, `Add` (residual)", made.vectors())
def residual() -> Any:
    x = keras.Input((12,))
    h = layers.PReLU()(layers.EinsumDense("ab,bc->ac", 12, bias_axes="c")(x))
    return compiled(keras.Model(x, layers.Dense(4)(layers.Add()([x, h]))))


@row("`Conv1D`, `MaxPooling1D`", made.vectors(10, 3))
def conv1d() -> Any:
    return classifier((10, 3), layers.Conv1D(6, 3, activation="relu"), layers.MaxPooling1D(), layers.Flatten())


@row("`Conv2D`, `GlobalAveragePooling2D`", made.images())
def conv2d() -> Any:
    return classifier((8, 8, 3), layers.Conv2D(6, 3, activation="relu"), layers.GlobalAveragePooling2D())


@row("`Conv3D`", made.vectors(5, 5, 5, 1))
def conv3d() -> Any:
    return classifier((5, 5, 5, 1), layers.Conv3D(3, 3, activation="relu"), layers.Flatten())


@row("`SeparableConv2D`, `DepthwiseConv2D`", made.images())
def separable() -> Any:
    parts = layers.SeparableConv2D(6, 3, activation="relu"), layers.DepthwiseConv2D(3), layers.Flatten()
    return classifier((8, 8, 3), *parts)


@row("`Conv2DTranspose`, `UpSampling2D`", made.themselves(8, 8, 1))
def transpose() -> Any:
    parts = layers.Conv2D(4, 3, strides=4, padding="same", activation="relu"), layers.UpSampling2D()
    last = layers.Conv2DTranspose(1, 3, strides=2, padding="same")
    return compiled(keras.Sequential([keras.Input((8, 8, 1)), *parts, last]), loss="mse", metrics=["mae"])


@row("`Embedding` with `mask_zero`, `LSTM`", made.tokens())
def lstm() -> Any:
    return classifier((10,), layers.Embedding(made.VOCABULARY, 6, mask_zero=True), layers.LSTM(6), dtype="int32")


@row("`Masking`, `GRU`", made.vectors(8, 3))
def gru() -> Any:
    return classifier((8, 3), layers.Masking(), layers.GRU(6))


@row("`Bidirectional`, stacked recurrent layers", made.vectors(8, 3))
def bidirectional() -> Any:
    return classifier((8, 3), layers.Bidirectional(layers.LSTM(4, return_sequences=True)), layers.SimpleRNN(6))


@row("`TimeDistributed`, rows of any length", made.vectors(8, 3))
def time_distributed() -> Any:
    return classifier((None, 3), layers.TimeDistributed(layers.Dense(6)), layers.GlobalAveragePooling1D())


@row("`ConvLSTM1D`", made.vectors(4, 6, 2))
def conv_lstm() -> Any:
    return classifier((4, 6, 2), layers.ConvLSTM1D(3, 3), layers.Flatten())


@row("`MultiHeadAttention`, `LayerNormalization` (transformer encoder)", made.tokens())
def transformer() -> Any:
    ids = keras.Input((10,), dtype="int32")
    x = layers.Embedding(made.VOCABULARY, 8)(ids)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 4)(x, x))
    x = layers.LayerNormalization()(x + layers.Dense(8)(layers.Dense(16, activation="gelu")(x)))
    return compiled(keras.Model(ids, layers.Dense(4)(layers.GlobalAveragePooling1D()(x))))


@row("`GroupQueryAttention`, `Attention`, `RMSNormalization`", made.vectors(6, 8))
def attention() -> Any:
    rows = keras.Input((6, 8))
    x = layers.RMSNormalization()(rows + layers.GroupQueryAttention(4, 4, 2)(rows, rows))
    x = layers.Attention()([x, rows])
    return compiled(keras.Model(rows, layers.Dense(4)(layers.Flatten()(x))))


@row("`BatchNormalization`: statistics are averaged over the ranks", made.images())
def batch_norm() -> Any:
    parts = layers.Conv2D(4, 3, use_bias=False), layers.BatchNormalization(momentum=0.6), layers.ReLU()
    return classifier((8, 8, 3), *parts, layers.GlobalAveragePooling2D())


@row("`GroupNormalization`, `UnitNormalization`", made.images())
def group_norm() -> Any:
    parts = layers.Conv2D(4, 3), layers.GroupNormalization(2), layers.Flatten(), layers.UnitNormalization()
    return classifier((8, 8, 3), *parts)


@row("`SpectralNormalization`", made.vectors())
def spectral_norm() -> Any:
    return classifier((12,), layers.SpectralNormalization(layers.Dense(8, activation="tanh")))


@row("`Dropout`: other units on each rank", made.vectors())
def dropout() -> Any:
    return classifier((12,), layers.Dense(16, activation="tanh"), layers.Dropout(0.5, seed=1))


@row("`GaussianNoise`, `SpatialDropout1D`", made.vectors(8, 3))
def noise() -> Any:
    return classifier((8, 3), layers.GaussianNoise(0.2, seed=1), layers.SpatialDropout1D(0.3, seed=2), layers.Flatten())


@row("`RandomFlip`, `RandomTranslation` (augmentation in the model)", made.images())
def augmentation() -> Any:
    parts = layers.RandomFlip(), layers.RandomTranslation(0.2, 0.2)
    return classifier((8, 8, 3), *parts, layers.Conv2D(4, 3), layers.Flatten())


@row("`Normalization` after `adapt`, `Rescaling`", made.vectors())
def normalization() -> Any:
    normal = layers.Normalization()
    normal.adapt(training(made.vectors(), 0)[0])
    return classifier((12,), normal, layers.Rescaling(0.5), layers.Dense(8, activation="tanh"))


@row("`CategoryEncoding`, `Lambda`, `Reshape`", made.tokens(dtype="int64"))
def encoding() -> Any:
    counts = layers.CategoryEncoding(made.VOCABULARY, output_mode="count")
    doubled = layers.Lambda(lambda x: 2 * x, output_shape=(made.VOCABULARY,))
    return classifier((10,), counts, doubled, layers.Reshape((5, 4)), layers.Flatten(), dtype="int64")


@row("softmax that is not the last layer", made.vectors())
def softmax_then_reshape() -> Any:
    parts = layers.Dense(4, activation="softmax"), layers.Reshape((4,))
    model = keras.Sequential([keras.Input((12,)), *parts])
    return compiled(model, loss="sparse_categorical_crossentropy", metrics=["accuracy"])
