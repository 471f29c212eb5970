"""A timeline of a run in Chrome's trace format, for Perfetto (ui.perfetto.dev) and chrome://tracing."""

from __future__ import annotations
