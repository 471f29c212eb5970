"""All of MPI: start-up, links, collectives, and the thread that drives them."""

from __future__ import annotations
