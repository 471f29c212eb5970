"""The two kinds of failure, which a job script distinguishes by the exit code."""

from __future__ import annotations

import signal
import sys
from collections.abc import Collection
from types import TracebackType


class UserError(Exception):
    """A mistake that the user can fix; one line says what to change. Exit code 2.

    ``quiet``: another rank reports it already.
    """

    def __init__(self, message: str, *, quiet: bool = False) -> None:
        super().__init__(message)
        self.quiet = quiet


class RunError(Exception):
    """A failure of the run itself, for example a loss that is not finite. Exit code 1, or ``exit_code``.

    ``quiet``: another rank reports it already.
    """

    def __init__(self, message: str, *, quiet: bool = False, exit_code: int = 1) -> None:
        super().__init__(message)
        self.quiet, self.exit_code = quiet, exit_code


class Stalled(RunError):
    """A wait that has lasted as long as ``--stall-limit`` allows. ``peers``: the ranks that were waited for."""

    def __init__(self, message: str, peers: Collection[int] = ()) -> None:
        super().__init__(message)
        self.peers = frozenset(peers)


class DataError(RunError):
    """A batch that no model can be trained or tested on."""


def in_one_line() -> None:
    """Have Python print one of these in one line, without a traceback, if a program does not catch it.

    The program then ends with the exit code of the run, even if signals are repeated meanwhile.
    """
    shown = sys.excepthook
    if getattr(shown, "is_ours", False):
        return

    def show(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if not isinstance(error, UserError | RunError):
            shown(kind, error, traceback)
            return
        if not error.quiet:
            print(f"dlion: {error}", file=sys.stderr, flush=True)
        if isinstance(error, RunError) and error.exit_code != 1:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            raise SystemExit(error.exit_code)

    show.is_ours = True  # type: ignore[attr-defined]
    sys.excepthook = show
