"""``dlion simulate``: train in virtual time on a described micro-cloud."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from dlion_mpi.commands.arguments import add_run_options
from dlion_mpi.config.fields import flag
from dlion_mpi.errors import UserError
from dlion_mpi.log import complain
from dlion_mpi.microcloud import environments
from dlion_mpi.simulation.simulate import micro_cloud, simulate
from dlion_mpi.strategies.given import config_of

RESUMING = ("resume", "requeue", "resume_earlier")


def add_arguments(parser: argparse.ArgumentParser, words: Sequence[str] = ()) -> None:
    """Add the options of `dlion simulate`: the micro-cloud, and those of `dlion train`. ``words``: the command line."""
    parser.description = (
        "Train on all workers of a micro-cloud in virtual time, in this one process: real gradients, the same loop, "
        "links and pace as the environment says. The last line on stdout is one JSON object."
    )
    parser.epilog = "More options: dlion simulate --help-all"
    cloud = parser.add_argument_group(
        "micro-cloud",
        "One more strategy, computed by formula: free-network (synchronous SGD, perfect balance,\n"
        "communication that costs nothing).",
    )
    cloud.add_argument(
        "--env",
        required=True,
        metavar="NAME|FILE.toml",
        help=f"one of {', '.join(environments.names())}, or a file like those",
    )
    cloud.add_argument("--workers", metavar="N", help="number of workers, if those of the environment are all alike")
    add_run_options(parser, words, hidden={"checkpoints"})
    for name in RESUMING:  # known, so that they are refused with a reason
        nargs = "?" if name == "resume" else 0
        parser.add_argument(flag(name), action=_Refused, nargs=nargs, help=argparse.SUPPRESS)
    parser.set_defaults(action=main)


class _Refused(argparse.Action):
    def __call__(self, *_: object) -> None:
        raise UserError(f"{flag(self.dest)} belongs to dlion train: a simulated run is repeated instead, from its seed")


def main(args: argparse.Namespace) -> int:
    """Run ``dlion simulate``; the result is one JSON object on stdout. Returns the exit code."""
    config = config_of(vars(args))
    environment = micro_cloud(args.env, args.workers)
    done = simulate(config, environment)
    if done.exit_code:
        complain(str(done.summary["stopped"]))
    print(json.dumps(done.summary), flush=True)
    return done.exit_code
