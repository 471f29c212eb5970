"""Import of a user's model or strategy, named as PACKAGE.MODULE:NAME."""

from __future__ import annotations

import importlib
import os
import sys
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
    finally:
        sys.path.pop(0)
    found = getattr(module, name, None)
    if not callable(found):
        raise UserError(f"{option} {spec}: {module_name} has no {kind} {name}")
    return found
