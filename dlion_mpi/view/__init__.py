"""A run as people see it: lines, the live view, TensorBoard."""

from __future__ import annotations
