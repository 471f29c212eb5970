"""All of MPI: start-up, ranks, transport, collectives, and the thread that drives them."""

from __future__ import annotations
