"""What a run can be resumed from: docs/checkpoints.md. `rounds` is where the worker's loop comes in.

`file`: one rank's file. `folder`: when files make a checkpoint, and which stay. `snapshot`: a worker as arrays and
back. `rounds`: how workers take one together while they train. `preemption`: what makes them end early. `start`,
`resume`: how a run goes on. `session`: what `run.py` needs of all this.
"""

from __future__ import annotations
