"""Records of the emulations on this machine: their parts, their owners, and their removal.

A record is written before anything is built, so that the next `dlion emulate` can remove the rest of a killed run.
Records are in /run/dlion, or in DLION_RUNTIME_DIR if that is set.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dlion_mpi.emulation import netns
from dlion_mpi.errors import UserError

FOLDER_PREFIX = "dlion-emulation-"


@dataclass(frozen=True, kw_only=True)
class Emulation:
    """One emulated micro-cloud.

    `environment`: built-in name or absolute path. `folder`: its temporary files. `owner_pid` and `owner_started` (clock
    ticks since boot): the process that removes it; None if `up` created it.
    """

    name: str
    environment: str
    workers: int
    folder: str
    owner_pid: int | None = None
    owner_started: int | None = None

    @property
    def clock(self) -> Path:
        """File in which the training program reports the start of training."""
        return Path(self.folder) / "clock"

    def owner_lives(self) -> bool:
        """Whether the owning process is running (False if there is no owner)."""
        return self.owner_pid is not None and _started(self.owner_pid) == self.owner_started

    def is_stale(self) -> bool:
        """Whether the owning process was killed and left it behind."""
        return self.owner_pid is not None and not self.owner_lives()


def records() -> Path:
    """Directory of the records."""
    return Path(os.environ.get("DLION_RUNTIME_DIR") or "/run/dlion")


def claim(environment: str, workers: int, *, name: str | None, owned: bool) -> Emulation:
    """Record a new emulation and create its folder. The name is random unless `name` is given.

    `owned`: whether it ends with this process. Raises UserError if the name is taken or invalid.
    """
    if name is not None and not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,31}", name):
        raise UserError(f"emulation name {name!r}: use 1 to 32 lower-case letters, digits and dashes")
    chosen = name or secrets.token_hex(3)
    down = f"`dlion emulate down --name {chosen}`"
    taken = f"an emulation {chosen} exists already: choose another --name, or {down}"
    if netns.exists(chosen, workers):
        raise UserError(taken)
    temporary = Path(tempfile.gettempdir())
    if any(character.isspace() for character in str(temporary)):
        raise UserError(f"TMPDIR {str(temporary)!r} has a space, which mpirun does not accept: set another TMPDIR")
    emulation = Emulation(
        name=chosen,
        environment=environment,
        workers=workers,
        folder=str(temporary / f"{FOLDER_PREFIX}{chosen}-{secrets.token_hex(4)}"),
        owner_pid=os.getpid() if owned else None,
        owner_started=_started(os.getpid()) if owned else None,
    )
    records().mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = records() / f".{chosen}.{os.getpid()}"
    partial.write_text(json.dumps(asdict(emulation)), encoding="utf-8")
    try:
        os.link(partial, _record(chosen))  # a link fails where a rename would overwrite
    except FileExistsError:
        raise UserError(taken) from None
    finally:
        partial.unlink()
    os.mkdir(emulation.folder, 0o700)
    return emulation


def find_all() -> list[Emulation]:
    """List all recorded emulations by name."""
    found = (_read(path) for path in sorted(records().glob("*.json")))
    return [emulation for emulation in found if emulation is not None]


def take_down(emulation: Emulation) -> list[str]:
    """Kill its processes and delete its namespaces, folder and record. Can be repeated.

    Returns one line per failure; the record then stays, so that `down` can try again.
    """
    problems = netns.destroy(emulation.name, emulation.workers)
    if Path(emulation.folder).name.startswith(FOLDER_PREFIX):
        shutil.rmtree(emulation.folder, ignore_errors=True)
    if not problems:
        _record(emulation.name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others are still recorded there
            records().rmdir()
    return problems


def sweep() -> list[str]:
    """Remove the emulations that killed runs left behind. Returns their names."""
    stale = [emulation for emulation in find_all() if emulation.is_stale()]
    for emulation in stale:
        take_down(emulation)
    return [emulation.name for emulation in stale]


def _record(name: str) -> Path:
    return records() / f"{name}.json"


def _read(path: Path) -> Emulation | None:
    """Read a record. Returns None if it is missing or invalid."""
    try:
        table: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Emulation(**table)
    except (OSError, ValueError, TypeError):
        return None


def _started(pid: int) -> int | None:
    """Return the start of a process in clock ticks since boot, which identifies it even if its id is reused.

    Returns None if the process has ended.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
