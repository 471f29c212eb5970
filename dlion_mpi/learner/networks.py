"""More built-in models: residual networks, byte-level transformers, a network for tables.

Each takes the example rows that it is built for, and may take the number of classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import optree

from dlion_mpi.errors import UserError
from dlion_mpi.learner.batch import Batch

BYTES = 256
"""Tokens of a byte-level model."""
CATEGORIES = 8192
"""Largest number of categories of a column."""


def residual(example: Batch, classes: int | None, *, blocks: int, width: int) -> Any:
    """A residual network with batch normalisation for images (H, W, C); ``blocks`` in each of its stages.

    Three stages of ``width``, twice and four times ``width`` channels; a fourth of eight times if there are two blocks
    in a stage. Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016: ResNet-20 has 3 blocks and
    16 channels, ResNet-18 2 blocks and 64 channels, here with a first convolution of 3x3.
    """
    from keras import Input, Model, layers

    shape: tuple[int, ...] = getattr(example.x, "shape", ())[1:]
    if len(shape) != 3 or min(shape[:2]) < 8 or classes is None:
        raise UserError("this model wants images of at least 8x8 with class labels: choose another --model")

    def normalised(x: Any, channels: int, size: int, strides: int) -> Any:
        x = layers.Conv2D(channels, size, strides, padding="same", use_bias=False, kernel_initializer="he_normal")(x)
        return layers.BatchNormalization(momentum=0.9)(x)

    inputs = Input(shape)
    x = layers.Rescaling(1 / 255)(inputs) if example.x.dtype == np.uint8 else inputs
    x = layers.ReLU()(normalised(x, width, 3, 1))
    for stage in range(4 if blocks == 2 else 3):
        for block in range(blocks):
            channels, strides = width << stage, 2 if stage and not block else 1
            out = layers.ReLU()(normalised(x, channels, 3, strides))
            out = normalised(out, channels, 3, 1)
            if strides > 1:
                x = normalised(x, channels, 1, strides)
            x = layers.ReLU()(layers.Add()([x, out]))
    x = layers.GlobalAveragePooling2D()(x)
    return Model(inputs, layers.Dense(classes)(x), name=f"resnet{20 if blocks == 3 else 18}")


def transformer(example: Batch, *, depth: int, width: int, heads: int) -> Any:
    """A decoder for rows of bytes (T,) that gives the logits of the next byte at every place, (T, 256).

    Pre-normalised blocks of causal attention and a dense part of four times the width. Source: Radford et al.,
    "Language Models are Unsupervised Multitask Learners" (GPT-2), 2019.
    """
    from keras import Input, Model, layers, ops

    shape: tuple[int, ...] = getattr(example.x, "shape", ())[1:]
    if len(shape) != 1 or example.x.dtype.kind not in "iu":
        raise UserError("--model transformer wants rows of bytes, such as those of --data text: choose another --model")

    inputs = Input(shape, dtype="int32")
    places = ops.cumsum(ops.ones_like(inputs), axis=1) - 1
    x = layers.Embedding(BYTES, width, name="bytes")(inputs) + layers.Embedding(shape[0], width, name="places")(places)
    for _ in range(depth):
        normalised = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(heads, width // heads)(normalised, normalised, use_causal_mask=True)
        normalised = layers.LayerNormalization()(x)
        x = x + layers.Dense(width)(layers.Dense(4 * width, activation="gelu")(normalised))
    return Model(inputs, layers.Dense(BYTES)(layers.LayerNormalization()(x)), name="transformer")


def mlp(example: Batch, classes: int | None) -> Any:
    """Dense layers over one array or a dict of columns; a column of integers is embedded.

    One output without an activation, or as many as there are classes.
    """
    from keras import Input, Model, layers

    def features(inputs: Any) -> Any:
        if "int" in inputs.dtype:
            inputs = layers.Embedding(CATEGORIES, 8)(inputs)
        return layers.Flatten()(inputs) if len(inputs.shape) > 2 else layers.Reshape((-1,))(inputs)

    def column(name: str, leaf: Any) -> Any:
        return Input(leaf.shape[1:], dtype="int32" if leaf.dtype.kind in "iu" else "float32", name=name)

    if isinstance(example.x, dict):
        inputs: Any = {name: column(name, leaf) for name, leaf in example.x.items()}
    else:
        inputs = optree.tree_map(lambda leaf: column("x", leaf), example.x)
    parts = [features(one) for one in optree.tree_leaves(inputs)]
    x = layers.Concatenate()(parts) if len(parts) > 1 else parts[0]
    for units in (128, 64):
        x = layers.Dense(units, activation="relu")(x)
    return Model(inputs, layers.Dense(classes or 1)(x), name="mlp")
