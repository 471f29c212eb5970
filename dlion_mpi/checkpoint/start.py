"""Start of a run from its options: a new run, or one that resumes from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlion_mpi.checkpoint import folder
from dlion_mpi.config.fields import flag
from dlion_mpi.config.options import FIELDS, Config
from dlion_mpi.errors import UserError
from dlion_mpi.strategies.given import config_of, values_of

ENDS = ("steps", "seconds", "target")
CHANGEABLE = {
    *ENDS,
    *("evaluate_every", "test_samples", "progress_every", "stall_limit", "non_finite", "threads", "learning_rate"),
    *("checkpoint_every", "keep_checkpoints", "time_limit", "save_model", "save_model_of", "best"),
    *("exchange_share", "batch_size_max", "patience"),
}
"""Options that may change when a run resumes."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """The starting point of a run.

    ``run``: folder of the run to resume, None for a new run. ``earlier``: resume from an earlier checkpoint if the
    newest is damaged. ``or_over``: start from the beginning if there is no checkpoint.
    """

    run: Path | None = None
    earlier: bool = False
    or_over: bool = False


NEW = Start()


def plan(options: dict[str, Any]) -> tuple[Config, Start]:
    """Return the Config and the starting point for parsed options. Raises UserError."""
    resume, requeue, earlier = options.get("resume"), options.get("requeue"), bool(options.get("resume_earlier"))
    if resume and requeue:
        raise UserError("--resume and --requeue exclude each other: give --resume RUN, or --requeue with --out RUN")
    if earlier and not (resume or requeue):
        raise UserError("--resume-earlier needs --resume or --requeue: add one of them")
    if requeue:
        config = config_of(options)
        if config.checkpoint_every is None:
            raise UserError("--requeue needs --out and --checkpoint-every: it resumes from the checkpoints in --out")
        run = Path(str(config.out))
        if not folder.complete(run):
            return config, Start(run=run, or_over=True) if run.is_dir() else NEW
    elif resume:
        run = Path(resume)
        _check_run(run)
    else:
        return config_of(options), NEW
    return _changed(run, options), Start(run=run, earlier=earlier, or_over=bool(requeue))


def _check_run(run: Path) -> None:
    if not (run / "config.toml").is_file():
        raise UserError(f"--resume {run}: holds no run (no config.toml): give a folder that --out created")
    if not folder.complete(run):
        found = "only an incomplete one" if folder.incomplete(run) else "none"
        raise UserError(
            f"--resume {run}: has no checkpoint to resume from ({found} in {run / folder.FOLDER}): "
            "start a new run with --checkpoint-every"
        )


def _changed(run: Path, options: dict[str, Any]) -> Config:
    """Return a run's Config with the options given now. Raises UserError for an option that may not change."""
    saved = values_of({"config": str(run / "config.toml")})
    given = values_of(options, strategy=saved["strategy"])
    given.pop("out", None) if _same_folder(given.get("out"), run) else None
    for name, value in given.items():
        before = saved.get(name, FIELDS[name].default if name in FIELDS else None)
        if name not in CHANGEABLE and value != before:
            raise UserError(
                f"{flag(name)} {value}: the run in {run} was started with "
                f"{before if before is not None else 'none'}, and this option cannot change on resume: "
                "drop it, or start a new run"
            )
    if any(name in given for name in ENDS):  # a new end replaces the old one
        saved = {name: value for name, value in saved.items() if name not in ENDS}
    return Config.of({**saved, **given, "out": str(run)})


def _same_folder(out: Any, run: Path) -> bool:
    return out is not None and Path(out).resolve() == run.resolve()
