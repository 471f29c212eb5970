"""``dlion train``: train on all ranks of an MPI job, or alone as one rank."""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Sequence

from dlion_mpi.commands.arguments import add_run_options, show
from dlion_mpi.log import complain, say

EXAMPLES = """examples:
  dlion launch -n 4 train --data fashion-mnist --steps 500 --out runs/a
  dlion launch -n 4 train --strategy baseline --steps 500 --out runs/b
  dlion train --data digits --steps 200                      one rank
  dlion launch -n 4 train --steps 5000 --out runs/c --checkpoint-every 10m
  dlion launch -n 4 train --resume runs/c                    resumes from its newest checkpoint
  srun --mpi=pmix dlion train --model mypkg.nets:build --data 'shard-{rank}.h5' --seconds 600
"""


def add_arguments(parser: argparse.ArgumentParser, words: Sequence[str] = ()) -> None:
    """Add the options of `dlion train`. ``words``: the command line; see `add_run_options`."""
    parser.description = (
        "Train on one rank, or on every rank of dlion launch, mpirun or srun. Progress is written to stderr; the last "
        "line on stdout is one JSON object."
    )
    parser.epilog = EXAMPLES + "\nMore options: dlion train --help-all"
    add_run_options(parser, words)
    group = parser.add_argument_group("resuming a run")
    show(
        group.add_argument("--resume", metavar="RUN"),
        "resume a run of --out from its newest checkpoint with its options; a new end (--steps, --seconds) counts from "
        "the start of the run",
        common=True,
    )
    show(
        group.add_argument("--requeue", action="store_true"),
        "start in --out, or resume from a checkpoint there: for jobs that a scheduler starts again",
        common=False,
    )
    show(
        group.add_argument("--resume-earlier", action="store_true"),
        "if the newest checkpoint is damaged, resume from the one before it",
        common=False,
    )
    parser.set_defaults(action=main)


def main(args: argparse.Namespace) -> int:
    """Run ``dlion train``. Returns the exit code."""
    from dlion_mpi.checkpoint.preemption import EXIT_CODE
    from dlion_mpi.checkpoint.start import plan
    from dlion_mpi.strategies.registry import resolve

    config, start = plan(vars(args))
    resolve(config)  # refuse mistakes before MPI and Keras start
    from dlion_mpi.run import run

    done = run(config, start=start)
    if done.exit_code:  # perhaps stopped by a signal, which launchers repeat
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
    if done.rank == 0:
        if done.exit_code == EXIT_CODE:
            say(f"dlion: {done.summary['stopped']}")
        elif done.exit_code:
            complain(str(done.summary["stopped"]))
        print(json.dumps(done.summary), flush=True)
    return done.exit_code
