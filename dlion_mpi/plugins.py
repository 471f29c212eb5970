"""Import of a user's model or strategy, named as PACKAGE.MODULE:NAME."""

from __future__ import annotations

import importlib
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dlion_mpi.errors import UserError


def load(option: str, spec: str, *, built_in: str, kind: str) -> Any:
    """Import the ``kind`` (function, class) that ``spec`` names, with the current folder on the path.

    ``option``: the option that named it, and ``built_in``: the built-in names; both for the message. Raises UserError
    if ``spec`` is not such a name, or its module cannot be imported or lacks it.
    """
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise UserError(f"{option} {spec}: unknown; give {built_in}, or PACKAGE.MODULE:{kind.upper()}")
    sys.path.insert(0, os.getcwd())  # as `python -m` does, so that files in the current folder are found
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"{option} {spec}: cannot import {module_name} ({error})") from None
    except Exception as error:
        raise UserError(f"{option} {spec}: cannot import {module_name} ({described(error)})") from error
    finally:
        sys.path.pop(0)
    found = getattr(module, name, None)
    if not callable(found):
        raise UserError(f"{option} {spec}: {module_name} has no {kind} {name}")
    return found


def call(option: str, spec: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a user's function. Raises UserError, also for what the function raises."""
    try:
        return function(*arguments)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{option} {spec} fails: {described(error)}") from error


def described(error: BaseException) -> str:
    """Type, first line and place of an exception: the last line of the user's that it came from."""
    first = (str(error).strip() or "no message").splitlines()[0]
    others = (str(Path(__file__).parent), sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"], "<")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(others)]
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {first}{place}"
