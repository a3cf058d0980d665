"""How long ranks stand still when one of them is killed: from the signal to the next exchange of those that are left.

    python benchmarks/gossip_lost_rank.py --ranks 4 --victim 0 --runs 5

Starts the ranks on this machine without an agent, kills one with SIGKILL in the middle and prints, for each run, the
longest time of a survivor, in seconds. The model is small: it is the meeting that is measured, not the exchange.
"""

import argparse
import json
import multiprocessing
import os
import signal
import socket
import statistics
import time
from multiprocessing.queues import Queue

import torch
import torch.distributed as dist
from torch import nn

import distopt


def train(rank: int, ranks: int, port: int, topology: str, said: "Queue[tuple[int, str, float]]") -> None:
    """Steps until the first exchange without the one that was killed."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = distopt.Gossip(topology=topology).attach(model, optimizer)
    step = 0
    while len(attached.stats()["members"]) == ranks or attached.stats()["exchanges"] < step:
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        step += 1
        if step == 50:
            said.put((rank, "ready", time.time()))
    said.put((rank, "went on", time.time()))
    time.sleep(1.0)


def standstill(ranks: int, victim: int, topology: str) -> float:
    """Seconds, of the survivor that has waited longest."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    said = context.Queue()
    processes = [context.Process(target=train, args=(rank, ranks, port, topology, said)) for rank in range(ranks)]
    for process in processes:
        process.start()
    try:
        for _ in processes:
            said.get(timeout=120)
        time.sleep(1.0)
        killed_at = time.time()
        os.kill(processes[victim].pid or 0, signal.SIGKILL)
        return max(said.get(timeout=120)[2] for _ in range(ranks - 1)) - killed_at
    finally:
        for process in processes:
            process.kill()
            process.join()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--victim", type=int, default=0)
    parser.add_argument("--topology", default="one-peer-exponential")
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    seconds = [standstill(given.ranks, given.victim, given.topology) for _ in range(given.runs)]
    print(json.dumps({"seconds": [round(each, 3) for each in seconds], "median": round(statistics.median(seconds), 3)}))


if __name__ == "__main__":
    main()
