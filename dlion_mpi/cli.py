"""The command line: parse, build a Config, run; nothing else."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from dlion_mpi import __version__
from dlion_mpi.config.parsing import add_config_options
from dlion_mpi.errors import RunError, UserError
from dlion_mpi.log import complain

EXAMPLES = """examples:
  mpirun -n 4 dlion train --data fashion-mnist --steps 500 --out runs/a
  mpirun -n 4 dlion train --strategy baseline --steps 500 --out runs/b
  dlion train --data digits --steps 200                      one rank, no mpirun
  mpirun -n 4 dlion train --steps 5000 --out runs/c --checkpoint-every 10m
  mpirun -n 4 dlion train --resume runs/c                    goes on from its newest checkpoint
  srun --mpi=pmix dlion train --model mypkg.nets:build --data 'shard-{rank}.h5' --seconds 600
"""


class _Parser(argparse.ArgumentParser):
    """Says a mistake in one line, and takes no abbreviations: they would change their meaning with new options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options | {"allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ``dlion`` program. Returns the exit code: 0, 1 for a failed run, 2 for a mistake in its use."""
    try:
        args = _parser().parse_args(argv)
        return int(args.action(args))
    except UserError as error:
        if not error.quiet:
            complain(str(error))
        return 2
    except RunError as error:  # not even leaving in good order was possible
        complain(str(error))
        return _end_job(1)
    except KeyboardInterrupt:
        complain("interrupted")
        return _end_job(130)
    except Exception:
        traceback.print_exc()
        return _end_job(1)


def _end_job(code: int) -> int:
    """End all ranks: others may wait for this one for ever."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized() and mpi.COMM_WORLD.Get_size() > 1:
        sys.stderr.flush()
        mpi.COMM_WORLD.Abort(code)
    return code


def _parser() -> _Parser:
    parser = _Parser(
        prog="dlion",
        description="Train one Keras model across unequal machines and slow links, over MPI.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"dlion-mpi {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    _add_train(commands)
    _add_launch(commands)
    _add_data(commands)
    _add_simulate(commands)
    _add_report(commands)
    _add_trace(commands)
    _add_watch(commands)
    emulate = commands.add_parser("emulate", help="run a command on an emulated micro-cloud (root)")
    _add_emulate(emulate)
    doctor = commands.add_parser("doctor", help="what this machine has, what is missing, how to get it")
    doctor.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    doctor.set_defaults(action=_doctor)
    return parser


def _add_train(commands: Any) -> None:
    from dlion_mpi.strategies.registry import default_values

    train = commands.add_parser(
        "train",
        help="train, under mpirun or srun, or alone as one rank",
        description="Train on every rank of mpirun or srun, or alone as one rank. Progress goes to stderr; the last "
        "line on stdout is one JSON object.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES,
    )
    add_config_options(train, default_values())
    _add_beginnings(train)
    train.set_defaults(action=_train)


def _add_beginnings(train: argparse.ArgumentParser) -> None:
    group = train.add_argument_group("going on with a run", "See docs/checkpoints.md.")
    group.add_argument(
        "--resume",
        metavar="RUN",
        help="go on from the newest checkpoint in this folder, which --out of a run has made, with its options; an end "
        "given here (--steps, --seconds) is the whole run's",
    )
    group.add_argument(
        "--requeue",
        action="store_true",
        help="start in --out, or go on from the checkpoint there if there is one: for jobs that are started again",
    )
    group.add_argument(
        "--resume-earlier", action="store_true", help="if the newest checkpoint is damaged, take the one before it"
    )


def _train(args: argparse.Namespace) -> int:
    from dlion_mpi.checkpoint.preemption import EXIT_CODE
    from dlion_mpi.checkpoint.start import plan
    from dlion_mpi.log import say
    from dlion_mpi.strategies.registry import resolve

    config, start = plan(vars(args))
    resolve(config)  # refuse what is wrong before MPI and TensorFlow are started
    from dlion_mpi.run import run

    outcome = run(config, start=start)
    if outcome.exit_code:  # perhaps stopped by a signal, which launchers repeat
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
    if outcome.rank == 0:
        if outcome.exit_code == EXIT_CODE:
            say(f"dlion: {outcome.summary['stopped']}")
        elif outcome.exit_code:
            complain(str(outcome.summary["stopped"]))
        print(json.dumps(outcome.summary), flush=True)
    return outcome.exit_code


def _add_launch(commands: Any) -> None:
    from dlion_mpi.commands import launch

    parser = commands.add_parser(
        "launch",
        help="start the ranks of a run, with whichever MPI is here",
        description="Start the ranks of a run with the launcher that belongs to this Python's MPI: mpirun, or srun "
        "inside a Slurm job. Prints the command that it runs; passes signals and the exit code on.",
    )
    launch.add_arguments(parser)
    parser.set_defaults(action=launch.main)


def _add_data(commands: Any) -> None:
    from dlion_mpi.commands import data

    data.add_arguments(commands.add_parser("data", help="shard files for micro-clouds, and what is in a data set"))


def _add_simulate(commands: Any) -> None:
    from dlion_mpi.commands import simulate

    parser = commands.add_parser(
        "simulate",
        help="the same as train, in virtual time, on a micro-cloud that is described",
        description="Train on all workers of a micro-cloud in virtual time, in this one process: real gradients, the "
        "same loop, links and pace as the environment says. The last line on stdout is one JSON object.",
    )
    simulate.add_arguments(parser)
    parser.set_defaults(action=simulate.main)


def _add_report(commands: Any) -> None:
    from dlion_mpi.commands import report

    parser = commands.add_parser(
        "report",
        help="one HTML page of one run, or a comparison of many",
        description="Write one self-contained HTML page about runs: results, time to target, what differs between "
        "them, and each run's workers and links. Also of a run that is still going, or was killed.",
    )
    report.add_arguments(parser)
    parser.set_defaults(action=report.main)


def _add_trace(commands: Any) -> None:
    from dlion_mpi.commands import trace

    parser = commands.add_parser(
        "trace",
        help="a timeline of one run, for Perfetto or chrome://tracing",
        description="Write a timeline of a run in Chrome's trace format, for ui.perfetto.dev or chrome://tracing: what "
        "every rank did when, and every message on its way. Also of a run that is still going, or was killed.",
    )
    trace.add_arguments(parser)
    parser.set_defaults(action=trace.main)


def _add_watch(commands: Any) -> None:
    from dlion_mpi.commands import watch

    parser = commands.add_parser(
        "watch",
        help="follow a run from another shell",
        description="Show how a run of --out is getting on, from its metrics files alone: in a terminal a view that "
        "is drawn again and again, elsewhere lines. Ends when the run has; exit code 1 if it failed or was killed.",
    )
    watch.add_arguments(parser)
    parser.set_defaults(action=watch.main)


def _add_emulate(parser: argparse.ArgumentParser) -> None:
    from dlion_mpi.commands import emulate

    emulate.add_arguments(parser)
    parser.set_defaults(action=emulate.main)


def _doctor(args: argparse.Namespace) -> int:
    from dlion_mpi.commands.doctor import main as doctor

    return doctor(as_json=args.json)
