"""The two kinds of failure, which a job script distinguishes by the exit code."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can fix; one line says what to change. Exit code 2.

    ``quiet``: another rank reports it already.
    """

    def __init__(self, message: str, *, quiet: bool = False) -> None:
        super().__init__(message)
        self.quiet = quiet


class RunError(Exception):
    """A failure of the run itself, for example a loss that is not finite. Exit code 1."""
