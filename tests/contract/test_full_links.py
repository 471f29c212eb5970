"""Links that are to be full, in virtual time: busy all the time, and yet nothing queues for long."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dlion_mpi.simulation.network import payload_bytes_per_s
from tests.contract.test_simulated_runs import cloud, recorded


def test_full_links_stand_still_for_no_acknowledgement_and_do_not_queue(tmp_path: Path) -> None:
    """Acknowledgements wait as long as a message takes, behind what goes the other way."""
    full = {"link_share": 1.0, "patience": 0.0, "exchange_share": 0.0, "value_type": "bfloat16"}
    _, ranks = recorded(tmp_path, cloud(mbit=0.25), batching="fixed", steps=100, **full)
    for own in ranks:
        seconds = own["steps/time_s"][-1] - own["steps/time_s"][49]
        sent_bytes = (own["links/bytes_sent"][-1] - own["links/bytes_sent"][49]).sum()
        assert sent_bytes / seconds > 0.97 * payload_bytes_per_s(0.25)
        ages_s = own["links/age_s"][50:]
        ages = ages_s[np.isfinite(ages_s)] / np.median(own["steps/step_s"])
        assert np.percentile(ages, 95) < 2.5
