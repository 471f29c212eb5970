"""``dlion simulate``: train in virtual time on a described micro-cloud."""

from __future__ import annotations

import argparse
import json
from typing import Any

from dlion_mpi.config.options import flag
from dlion_mpi.config.parsing import add_config_options, config_of
from dlion_mpi.errors import UserError
from dlion_mpi.log import complain
from dlion_mpi.microcloud import environments
from dlion_mpi.simulation.simulate import micro_cloud, simulate
from dlion_mpi.strategies.registry import default_values


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `dlion simulate`: those of `dlion train`, and the micro-cloud."""
    cloud = parser.add_argument_group(
        "the micro-cloud",
        "Besides the strategies of train there are two by formula: free-network (synchronous SGD, perfect balance, "
        "communication that costs nothing) and allreduce (equal batches and a ring, as Horovod).",
    )
    cloud.add_argument(
        "--env",
        required=True,
        metavar="NAME|FILE.toml",
        help=f"one of {', '.join(environments.names())}, or a file such as those",
    )
    cloud.add_argument("--workers", metavar="N", help="as many workers, where those of the environment are all alike")
    add_config_options(parser, default_values())
    parser.add_argument("--resume", help=argparse.SUPPRESS)  # known, so that they are refused with a reason
    for name in ("--requeue", "--resume-earlier"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)


def _refuse_to_go_on(options: dict[str, Any]) -> None:
    for name in ("resume", "requeue", "resume_earlier"):
        if options.get(name):
            raise UserError(f"{flag(name)} belongs to dlion train: a simulated run is repeated instead, from its seed")


def main(args: argparse.Namespace) -> int:
    """Simulate what was asked for; the result is one JSON object on stdout. Returns the exit code."""
    _refuse_to_go_on(vars(args))
    config = config_of(vars(args))
    environment = micro_cloud(args.env, args.workers)
    outcome = simulate(config, environment)
    if outcome.exit_code:
        complain(str(outcome.summary["stopped"]))
    print(json.dumps(outcome.summary), flush=True)
    return outcome.exit_code
