"""The MPI program of `dlion emulate check`: every worker sends to all its peers at once, then runs paced iterations.

The arguments are the host names of the ranks, in order. Rank 0 prints one JSON line: the payload bytes that each link
delivered in each tenth of a second since the start, and the duration of paced iterations. `linkcheck` compares them
with the environment.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import time

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from dlion_mpi.microcloud import environments
from dlion_mpi.microcloud.environments import Environment, PaceClock

BIN_S = 0.1
WINDOW = 6  # messages in flight per link and direction
MESSAGE_S = 0.015  # duration of a message on its link
# Bounds of a message: above 64 KiB Open MPI asks the receiver first, and the question waits behind the other direction.
MESSAGE_BYTES = (4_096, 49_152)
WARM_UP_S = 2.0  # time before the clock starts, in which connections open and TCP finds its rate
IDLE_S = 0.0003
PACED_BATCH = 32
PACED_ITERATIONS = 5
TAG = 1


def measure_links(
    comm: MPI.Comm, environment: Environment, start_s: float, run_seconds: float
) -> npt.NDArray[np.int64]:
    """Saturate every link from now until `run_seconds` after `start_s` (seconds since the epoch).

    Returns (ranks, bins) int64: payload bytes received here from each rank in each bin.
    """
    peers = [peer for peer in range(comm.size) if peer != comm.rank]
    bins = math.ceil(run_seconds / BIN_S)
    received_bytes = np.zeros((comm.size, bins), dtype=np.int64)
    inbox = np.empty(MESSAGE_BYTES[1], dtype=np.uint8)  # all receives share it, since the contents do not matter
    receives = [comm.Recv_init(inbox, peer, TAG) for peer in peers for _ in range(WINDOW)]
    sends = [
        comm.Send_init(np.zeros(message_bytes(environment, comm.rank, peer), dtype=np.uint8), peer, TAG)
        for peer in peers
        for _ in range(WINDOW)
    ]
    sources = [peer for peer in peers for _ in range(WINDOW)]
    requests = receives + sends
    MPI.Prequest.Startall(receives)
    MPI.Prequest.Startall(sends)
    end_s = start_s + run_seconds
    talking = set(peers)
    waiting = set(range(len(receives)))
    statuses = [MPI.Status() for _ in requests]
    goodbyes: list[MPI.Request] = []
    while talking or not goodbyes:
        done = MPI.Request.Testsome(requests, statuses) or []
        now_s = time.time()
        if now_s >= end_s and not goodbyes:
            goodbyes = [comm.Isend(inbox[:0], peer, TAG) for peer in peers] or [MPI.REQUEST_NULL]
        for index, status in zip(done, statuses, strict=False):
            if index < len(receives):
                count = status.Get_count(MPI.BYTE)
                slot = math.floor((now_s - start_s) / BIN_S)
                if count == 0:
                    talking.discard(sources[index])
                elif 0 <= slot < bins:
                    received_bytes[sources[index], slot] += count
                if sources[index] in talking:
                    receives[index].Start()
                else:
                    waiting.discard(index)
            elif not goodbyes:
                sends[index - len(receives)].Start()
        if not done:
            time.sleep(IDLE_S)
    MPI.Request.Waitall([*goodbyes, *sends])
    for index in waiting:  # no message will match these
        receives[index].Cancel()
        receives[index].Wait()
    for request in requests:
        request.Free()
    return received_bytes


def message_bytes(environment: Environment, source: int, destination: int) -> int:
    """Return the size of a link's messages: small for its slowest rate, so that bins fill evenly."""
    slowest_mbit = min(environment.rate_mbit(source, destination, phase) for phase in environment.phases)
    return int(np.clip(slowest_mbit * 1e6 / 8 * MESSAGE_S, *MESSAGE_BYTES))


def measure_pace(environment: Environment, worker: int, run_seconds: float) -> npt.NDArray[np.float64]:
    """Run paced iterations of a little real compute in each phase.

    Returns (phases, 2) float64: seconds by the model, and the median of the seconds measured.
    """
    clock = PaceClock(environment=environment, worker=worker, run_seconds=run_seconds)
    matrix = np.ones((64, 64), dtype=np.float32)
    result = np.zeros((len(environment.phases), 2))
    for index, phase_start_s in enumerate(environment.phase_starts_s(run_seconds)):
        target_s = clock.seconds(PACED_BATCH, phase_start_s)
        took_s = []
        for _ in range(PACED_ITERATIONS):
            begin_s = time.monotonic()
            for _ in range(10):
                matrix = matrix @ matrix / 64.0
            time.sleep(max(0.0, target_s - (time.monotonic() - begin_s)))
            took_s.append(time.monotonic() - begin_s)
        result[index] = target_s, np.median(took_s)
    return result


def main() -> None:
    """Measure, gather on rank 0, print. Exits with a message if a rank runs on the wrong host."""
    comm = MPI.COMM_WORLD
    environment = environments.load(os.environ[environments.ENVIRONMENT_VARIABLE])
    run_seconds = float(os.environ[environments.SECONDS_VARIABLE])
    hosts = sys.argv[1:]
    if len(hosts) != comm.size or socket.gethostname() != hosts[comm.rank] or comm.size != environment.workers:
        sys.exit(f"rank {comm.rank} of {comm.size} runs on {socket.gethostname()}: not one rank per worker")
    start_s = np.zeros(1)
    if comm.rank == 0:
        start_s[0] = environments.start_clock(run_seconds, started_s=time.time() + WARM_UP_S)
    comm.Bcast(start_s)
    received_bytes = measure_links(comm, environment, float(start_s[0]), run_seconds)
    paces_s = measure_pace(environment, comm.rank, run_seconds)
    all_bytes = np.zeros((comm.size, *received_bytes.shape), dtype=np.int64)
    all_paces_s = np.zeros((comm.size, *paces_s.shape))
    comm.Gather(received_bytes, all_bytes)
    comm.Gather(paces_s, all_paces_s)
    if comm.rank == 0:
        print(json.dumps({"bin_s": BIN_S, "received_bytes": all_bytes.tolist(), "paces_s": all_paces_s.tolist()}))


if __name__ == "__main__":
    main()
