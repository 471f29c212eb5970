"""The command line: parse it, run the command, and turn an error into one line and an exit code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Any

from dlion_mpi import __version__
from dlion_mpi.commands import data, doctor, emulate, launch, report, simulate, trace, train, watch
from dlion_mpi.commands.arguments import Parser
from dlion_mpi.errors import RunError, UserError
from dlion_mpi.log import await_reader, complain


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ``dlion`` program. Returns the exit code: 0, 1 for a failed run, 2 for a mistake in its use."""
    words = sys.argv[1:] if argv is None else argv
    try:
        args = parser(words).parse_args(words)
        return int(args.action(args))
    except UserError as error:
        if not error.quiet:
            complain(str(error))
        return 2
    except RunError as error:  # the ranks could not leave regularly
        complain(str(error))
        return _end_job(1)
    except KeyboardInterrupt:
        complain("interrupted")
        return _end_job(130)
    except Exception:
        sys.stderr.write(traceback.format_exc())  # in one piece: mpirun may read no more of it
        return _end_job(1)


def _end_job(code: int) -> int:
    """Abort all ranks, because the other ranks may wait for this one forever."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized() and mpi.COMM_WORLD.Get_size() > 1:
        await_reader()
        mpi.COMM_WORLD.Abort(code)
    return code


def parser(words: Sequence[str] = ()) -> Parser:
    """Return the parser of all commands, each of which adds its own arguments. ``words``: the command line."""
    top = Parser(
        prog="dlion",
        description="Train one Keras model across unequal machines and slow links, over MPI.",
        epilog=train.EXAMPLES,
    )
    top.add_argument("--version", action="version", version=f"dlion-mpi {__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)

    def command(name: str, text: str) -> Any:
        return commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")

    def words_of(name: str) -> Sequence[str]:
        return words[1:] if words and words[0] == name else ()

    train.add_arguments(command("train", "train, under mpirun or srun, or alone as one rank"), words_of("train"))
    launch.add_arguments(command("launch", "start the ranks of a run, with whichever MPI is here"))
    data.add_arguments(command("data", "write shard files for micro-clouds; show what a data set holds"))
    simulate.add_arguments(
        command("simulate", "train in virtual time, on a described micro-cloud"), words_of("simulate")
    )
    report.add_arguments(command("report", "write one HTML page of one run, or a comparison of many"))
    trace.add_arguments(command("trace", "write a timeline of one run, for Perfetto or chrome://tracing"))
    watch.add_arguments(command("watch", "follow a run from another shell"))
    emulate.add_arguments(command("emulate", "run a command on an emulated micro-cloud (root)"))
    doctor.add_arguments(command("doctor", "show what this machine has, what is missing, and how to get it"))
    return top
