"""How a run begins, by its options: anew, or in the folder of one that goes on from its checkpoint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlion_mpi.checkpoint import folder
from dlion_mpi.config.options import Config, flag
from dlion_mpi.config.parsing import config_of, values_of
from dlion_mpi.errors import UserError

ENDS = ("steps", "seconds", "target_accuracy")
CHANGEABLE = {
    *ENDS,
    *("evaluate_every", "test_samples", "progress_every", "non_finite", "threads", "learning_rate"),
    *("checkpoint_every", "keep_checkpoints", "time_limit", "save_model", "save_model_of"),
    *("exchange_share", "exchange_thread", "window", "lbs_max", "patience"),
}
"""What the command line may change of a run that goes on."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """``run``: the folder of the run that goes on, None for a new run.

    ``earlier``: go on from an earlier checkpoint where the newest is damaged. ``or_over``: begin where there is none.
    """

    run: Path | None = None
    earlier: bool = False
    or_over: bool = False


NEW = Start()


def plan(options: dict[str, Any]) -> tuple[Config, Start]:
    """The Config and the beginning that parsed options ask for. Raises UserError."""
    resume, requeue, earlier = options.get("resume"), options.get("requeue"), bool(options.get("resume_earlier"))
    if resume and requeue:
        raise UserError("--resume and --requeue exclude each other: --requeue goes on in --out")
    if earlier and not (resume or requeue):
        raise UserError("--resume-earlier belongs to --resume or --requeue: give one of them")
    given = values_of(options)
    if requeue:
        config = config_of(options)
        if config.checkpoint_every is None:
            raise UserError("--requeue needs --out and --checkpoint-every: it goes on from the checkpoints there")
        run = Path(str(config.out))
        if not folder.complete(run):
            return config, Start(run=run, or_over=True) if run.is_dir() else NEW
    elif resume:
        run = Path(resume)
        _check_run(run)
    else:
        return config_of(options), NEW
    return _changed(run, given), Start(run=run, earlier=earlier, or_over=bool(requeue))


def _check_run(run: Path) -> None:
    if not (run / "config.toml").is_file():
        raise UserError(f"--resume {run}: holds no run (no config.toml); give the folder that --out of a run has made")
    if not folder.complete(run):
        begun = "only one that was never finished" if folder.incomplete(run) else "none"
        raise UserError(
            f"--resume {run}: has no checkpoint to go on from ({begun} in {run / folder.FOLDER}): "
            "start a new run with --checkpoint-every"
        )


def _changed(run: Path, given: dict[str, Any]) -> Config:
    """The Config of a run with what was given now. Raises UserError for what cannot be changed any more."""
    saved = values_of({"config": str(run / "config.toml")})
    defaults = {f.name: f.default for f in dataclasses.fields(Config)}
    given.pop("out", None) if _same_folder(given.get("out"), run) else None
    for name, value in given.items():
        before = saved.get(name, defaults[name])
        if name not in CHANGEABLE and value != before:
            raise UserError(
                f"{flag(name)} {value}: the run in {run} has {before if before is not None else 'none'}, and goes on "
                "with it: drop the option, or start a new run"
            )
    if any(name in given for name in ENDS):  # an end that is given takes the place of the one there was
        saved = {name: value for name, value in saved.items() if name not in ENDS}
    return Config(**{**saved, **given, "out": str(run)})


def _same_folder(out: Any, run: Path) -> bool:
    return out is not None and Path(out).resolve() == run.resolve()
