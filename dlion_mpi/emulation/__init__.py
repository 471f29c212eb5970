"""A micro-cloud emulated on one machine: namespaces and shaped links, the MPI launcher, the check of the rates."""

from __future__ import annotations
