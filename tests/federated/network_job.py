"""What ranks run for `test_network_jobs.py`: one job, whose ranks may be hurt on the way.

`JOB` is JSON: the algorithm, the number of rounds, what differs from the defaults, and for a rank what happens to it.
"""

import dataclasses
import json
import os
import pickle
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from distopt.comm import TCPPeer, read_secret
from distopt.federated import (
    Bernoulli,
    ClientData,
    DirichletPartition,
    Everybody,
    FederatedAlgorithm,
    Layout,
    LocalTraining,
    Participation,
    Service,
    Simulation,
    UplinkCompression,
    take_part,
)
from distopt.federated.execution import LoopTrainer
from distopt.federated.network import letters

CLIENTS = 9
_rng = np.random.default_rng(0)
INPUTS = torch.from_numpy(_rng.standard_normal((200, 6)))
LABELS = (INPUTS[:, 0] > 0).long() + (INPUTS[:, 1] > 0).long()


def build(width=8, *, plain=False):
    torch.manual_seed(0)
    if plain:
        return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3)).double()
    layers = nn.Linear(6, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(0.1), nn.Linear(width, 3)
    return nn.Sequential(*layers).double()


def data():
    return ClientData.split((INPUTS, LABELS), DirichletPartition(alpha=0.5, min_samples=2), CLIENTS, seed=1)


def evaluate(model):
    return {"accuracy": (model(INPUTS).argmax(1) == LABELS).double().mean()}


class Listed(Participation):
    """These participants, round by round."""

    def __init__(self, rounds):
        self._rounds = rounds

    def to_dict(self):
        return {"participation": "listed-in-a-test"}

    def begin(self, num_clients, seed=0):
        rounds = iter(self._rounds)
        return SimpleNamespace(num_clients=num_clients, next_round=lambda: np.array(next(rounds), dtype=np.int64))


def settings(job):
    algorithm = FederatedAlgorithm.from_dict(job["algorithm"])
    chance = job.get("chance")
    return {
        "model": build(plain=job.get("plain", False)),
        "clients": data(),
        "algorithm": algorithm,
        "local": LocalTraining(steps=3, batch_size=8, lr=0.1, drop_last=True) if algorithm.takes_steps else None,
        "participation": Everybody() if chance is None else Bernoulli(probability=chance),
        "evaluate": evaluate,
        "seed": job.get("seed", 5),
        "uplink": UplinkCompression(density=0.3) if job.get("compressed") else None,
    }


def simulated(job, participants=None):
    """The history's rows and the model of the same job in one process, with these participants if given."""
    made = settings(job)
    if participants is not None:
        made["participation"] = Listed(participants)
    history = Simulation(**made, mode="loop").run(job["rounds"])
    return history.rows, vector(made["model"])


def vector(model):
    return torch.cat([t.detach().reshape(-1) for t in model.state_dict().values() if t.is_floating_point()])


def hurt(fault, out):
    """Makes something happen where a client of this rank is trained."""
    train = LoopTrainer.train

    def trained(self, broadcast, clients):
        (client,) = clients
        hit = broadcast.version in fault["versions"] and client in fault.get("clients", [client])
        if hit:
            (out / f"hurt-{client}-{broadcast.version}").touch()
            if fault["what"] == "killed":
                time.sleep(fault.get("seconds", 0.0))  # for what was said before to arrive
                os.kill(os.getpid(), signal.SIGKILL)
            if fault["what"] == "frozen":
                os.kill(os.getpid(), signal.SIGSTOP)
            if fault["what"] == "slow":
                time.sleep(fault["seconds"])
            if fault["what"] == "fails":
                raise ZeroDivisionError("of this site")
        (reply,) = train(self, broadcast, clients)
        if hit and fault["what"] == "nan":
            reply.tensors["delta"][3] = float("nan")
        return [reply]

    LoopTrainer.train = trained


class Liar:
    """A transport of a site that does more than it should, with what it says at each reply; else as the real one."""

    def __init__(self, transport, lies):
        self._transport, self._lies, self._sent = transport, lies, []

    def __getattr__(self, name):
        return getattr(self._transport, name)

    def send(self, destination, frame):
        letter = letters.decode(frame)
        for lie in self._lies if isinstance(letter, letters.Answer) else ():
            self._lie(lie, destination, frame, letter)
        if "shape" not in self._lies or not isinstance(letter, letters.Answer):
            self._transport.send(destination, frame)
        self._sent.append(frame)

    def _lie(self, lie, destination, frame, answer):
        reply = answer.reply
        changed = {
            "stranger": {"client": CLIENTS + 3},
            "other": {"client": (reply.client + 1) % CLIENTS},
            "future": {"version": reply.version + 1},
            "shape": {"tensors": {**reply.tensors, "delta": reply.tensors["delta"][1:].clone()}},
        }
        if lie == "garbage":
            frame = torch.from_numpy(np.random.default_rng(reply.version).integers(0, 256, 1000).astype(np.uint8))
        elif lie == "replay" and self._sent:
            answers = [f for f in self._sent if isinstance(letters.decode(f), letters.Answer)]
            if not answers:
                return
            frame = answers[-1]
        elif lie == "pickle":
            frame = torch.frombuffer(bytearray(pickle.dumps(Bomb())), dtype=torch.uint8)
        elif lie == "sender":
            frame = letters.encode(dataclasses.replace(answer, sender=3 - self.rank))
        elif lie == "session":
            frame = letters.encode(dataclasses.replace(answer, session="0" * 16))
        elif lie in changed:
            frame = letters.encode(dataclasses.replace(answer, reply=dataclasses.replace(reply, **changed[lie])))
        self._transport.send(destination, frame)


class Bomb:
    """What creates a file where it is unpickled."""

    def __reduce__(self):
        return (open, (os.environ.get("BOMB", "bomb"), "w"))


def serve_until(job, out, **changed):
    made = {**settings(job), **job.get("server", {}), **changed}

    def progress(row):
        print("round", row["round"], flush=True)
        (out / f"round-{row['round']}").touch()
        while row["round"] == job.get("pause_after") and not (out / "go").exists():
            time.sleep(0.01)
        while row["round"] == job.get("pause_after") and len(service.sites) < job.get("sites_after_pause", 0):
            service._cohort._take(0.1)
        if row["round"] == job.get("kill_server_after") and not (out / "killed").exists():
            (out / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    if "tcp" in job:
        made.update(listen=f"127.0.0.1:{job['tcp']}", sites=job["sites"])
    if "checkpoint" in job:
        made.update(checkpoint=out / "run.pt", checkpoint_every=job["checkpoint"])
    with Service(**made, progress=progress) as service:
        service.resume()
        history = service.run(job["rounds"])
    counted = {"refused": dict(service.refused), "sent": service.bytes_sent, "received": service.bytes_received}
    return made["model"], history, counted


def take_part_in(job, rank, out, **changed):
    made = settings(job)
    for name in ("participation", "evaluate"):
        del made[name]
    if "tcp" in job:
        made.update(server=f"127.0.0.1:{job['tcp']}", rank=rank, sites=job["sites"])
    if lies := job.get("lies", {}).get(str(rank)):
        real = TCPPeer(
            made.pop("server"), rank=made.pop("rank"), size=1 + made.pop("sites"), secret=read_secret(),
            max_frame_bytes=letters.longest_frame(Layout(made["model"])),
        )  # fmt: skip
        made["transport"] = Liar(real, lies)
        os.environ.pop("DISTOPT_JOB_SECRET")  # TCP has it already
    if job.get("journal"):
        made["checkpoint"] = out / f"site-{rank}.pt"
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
        print(take_part_in(job, rank, out), flush=True)
    print("done", flush=True)


if __name__ == "__main__":
    main()
