"""Checkpoints, resume and preemption; docs/checkpoints.md explains them to users.

`file`: one rank's file. `folder`: complete checkpoints, and which ones are kept. `snapshot`: a worker as arrays and
back. `rounds`: checkpoint rounds, which the training loop drives. `preemption`: signals and time limits. `start`,
`resume`: options and state of a resumed run. `session`: the part that `run.py` uses.
"""

from __future__ import annotations
