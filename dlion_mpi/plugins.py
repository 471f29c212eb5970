"""What users bring of their own and name as PACKAGE.MODULE:NAME: a model, a strategy."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from dlion_mpi.errors import UserError


def load(option: str, spec: str, *, built_in: str, kind: str) -> Any:
    """The ``kind`` (function, class) that ``spec`` names, imported as `python -m` would from the current folder.

    ``option``, ``built_in``: for the message, what was given and the names that need no module. Raises UserError
    where ``spec`` is no such name, or its module cannot be imported or lacks it.
    """
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise UserError(f"{option} {spec}: unknown; give {built_in}, or PACKAGE.MODULE:{kind.upper()}")
    sys.path.insert(0, os.getcwd())  # as `python -m` does, so that a file beside the user's data is found
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"{option} {spec}: cannot import {module_name} ({error})") from None
    finally:
        sys.path.pop(0)
    found = getattr(module, name, None)
    if not callable(found):
        raise UserError(f"{option} {spec}: {module_name} has no {kind} {name}")
    return found
