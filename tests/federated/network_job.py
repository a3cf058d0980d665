"""What ranks run for `test_network_jobs.py`: one job, whose ranks may be hurt on the way.

`JOB` is JSON: the algorithm, the number of rounds, what differs from the defaults, and for a rank what happens to it.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from distopt.federated import (
    Bernoulli,
    ClientData,
    DirichletPartition,
    Everybody,
    FederatedAlgorithm,
    LocalTraining,
    Service,
    Simulation,
    UplinkCompression,
    take_part,
)
from distopt.federated.execution import LoopTrainer

CLIENTS = 9
_rng = np.random.default_rng(0)
INPUTS = torch.from_numpy(_rng.standard_normal((200, 6)))
LABELS = (INPUTS[:, 0] > 0).long() + (INPUTS[:, 1] > 0).long()


def build(width=8):
    torch.manual_seed(0)
    layers = nn.Linear(6, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(0.1), nn.Linear(width, 3)
    return nn.Sequential(*layers).double()


def data():
    return ClientData.split((INPUTS, LABELS), DirichletPartition(alpha=0.5, min_samples=2), CLIENTS, seed=1)


def evaluate(model):
    return {"accuracy": (model(INPUTS).argmax(1) == LABELS).double().mean()}


def settings(job):
    chance = job.get("chance")
    return {
        "model": build(job.get("width", 8)),
        "clients": data(),
        "algorithm": FederatedAlgorithm.from_dict(job["algorithm"]),
        "local": LocalTraining(steps=3, batch_size=8, lr=0.1, drop_last=True),
        "participation": Everybody() if chance is None else Bernoulli(probability=chance),
        "evaluate": evaluate,
        "seed": job.get("seed", 5),
        "uplink": UplinkCompression(density=0.3) if job.get("compressed") else None,
    }


def simulated(job):
    """The history's rows and the model of the same job in one process."""
    made = settings(job)
    history = Simulation(**made, mode="loop").run(job["rounds"])
    return history.rows, vector(made["model"])


def vector(model):
    return torch.cat([t.detach().reshape(-1) for t in model.state_dict().values() if t.is_floating_point()])


def hurt(fault, out):
    """Makes something happen where a client of this rank is trained."""
    train = LoopTrainer.train

    def trained(self, broadcast, clients):
        (client,) = clients
        if broadcast.version in fault["versions"] and client in fault.get("clients", [client]):
            (out / f"hurt-{client}-{broadcast.version}").touch()
            if fault["what"] == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault["what"] == "frozen":
                os.kill(os.getpid(), signal.SIGSTOP)
            if fault["what"] == "slow":
                time.sleep(fault["seconds"])
            if fault["what"] == "fails":
                raise ZeroDivisionError("of this site")
        (reply,) = train(self, broadcast, clients)
        if broadcast.version in fault["versions"] and fault["what"] == "nan":
            reply.tensors["delta"][3] = float("nan")
        return [reply]

    LoopTrainer.train = trained


def serve_until(job, out, **changed):
    made = {**settings(job), **job.get("server", {}), **changed}

    def progress(row):
        print("round", row["round"], flush=True)
        if row["round"] == job.get("kill_server_after"):
            os.kill(os.getpid(), signal.SIGKILL)

    if "checkpoint" in job:
        made.update(checkpoint=out / "run.pt", checkpoint_every=job["checkpoint"])
    with Service(**made, progress=progress) as service:
        service.resume()
        history = service.run(job["rounds"])
        counted = {"refused": service.refused, "sent": service.bytes_sent, "received": service.bytes_received}
    return made["model"], history, counted


def take_part_in(job, rank, **changed):
    made = settings(job)
    for name in ("participation", "evaluate"):
        del made[name]
    return take_part(**{**made, **job.get("site", {}), **changed})


def main():
    torch.set_num_threads(1)
    job, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    rank = int(os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0")))
    if (fault := job.get("faults", {}).get(str(rank))) is not None:
        hurt(fault, out)
    if rank == 0:
        model, history, counted = serve_until(job, out)
        torch.save({"rows": history.rows, "model": vector(model), **counted}, out / "server.pt")
    else:
        took = take_part_in(job, rank)
        print(took, flush=True)
    print("done", flush=True)


if __name__ == "__main__":
    main()
