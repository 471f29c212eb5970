"""The model, its data and its evaluation: all of Keras."""

from __future__ import annotations
