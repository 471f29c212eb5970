"""Read TensorBoard's event files back, as records of serialised protocol buffers."""

from __future__ import annotations

from pathlib import Path


def scalars(folder: Path) -> dict[str, list[tuple[int, float, float]]]:
    """By tag: (step, wall time, value) in the order they were written. There is one event file."""
    import tensorflow as tf

    (path,) = folder.glob("events.out.tfevents.*")
    found: dict[str, list[tuple[int, float, float]]] = {}
    for record in tf.data.TFRecordDataset(str(path)):
        event = tf.compat.v1.Event.FromString(record.numpy())
        for value in event.summary.value:
            assert value.WhichOneof("value") == "simple_value"
            found.setdefault(value.tag, []).append((event.step, event.wall_time, value.simple_value))
    return found
