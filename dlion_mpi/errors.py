"""The two ways a run ends badly, told apart by the exit code a job script sees."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right: one line that says what to change. Exit code 2.

    ``quiet``: another rank says it already.
    """

    def __init__(self, message: str, *, quiet: bool = False) -> None:
        super().__init__(message)
        self.quiet = quiet


class RunError(Exception):
    """The run itself failed, for example a loss that is no longer finite. Exit code 1."""
