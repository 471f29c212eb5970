"""Renamed and removed options. Each is refused with a message that says what to write instead."""

from __future__ import annotations

from dlion_mpi.config.fields import flag

RENAMED = {
    "lbs": "--batch-size",
    "lbs_max": "--batch-size-max",
    "gbs_schedule": "--global-batch",
    "ako_partitions": "--ako.partitions",
    "gaia_threshold": "--gaia.threshold",
    "gaia_barrier": "--gaia.barrier",
    "hop_graph": "--hop.graph",
    "hop_max_gap": "--hop.max-gap",
    "hop_skip": "--hop.skip",
    "weighting": "--dlion.weighting",
    "max_n": "--dlion.max-n",
    "unsent": "--dlion.unsent",
    "own_gradient": "--dlion.unsent (accumulate or drop)",
    "link_share": "--dlion.link-share",
    "target_accuracy": "--target 'accuracy>=VALUE'",
    "message_limit": "--dlion.link-share (without a separate limit)",
}
FIXED = {
    "n_min": "0.85",
    "rebalance_every": "10 steps",
    "gbs_interval": "500 steps",
    "gbs_warmup_step": "32 samples",
    "gbs_warmup_limit": "0.01",
    "gbs_speedup_factor": "1.5",
    "gbs_limit": "0.1",
    "exchange_thread": "on",
    "window": "2 messages, 3 in dlion",
    "transfer_losses": "10 losses",
}


def refusal(name: str) -> str | None:
    """Return the message for a former option, or None if there never was one with this name."""
    if name in RENAMED:
        return f"{flag(name)} is now {RENAMED[name]}"
    if name in FIXED:
        return f"{flag(name)} is fixed now, at {FIXED[name]}: drop it"
    return None
