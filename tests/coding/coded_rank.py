"""A rank of a coded training in a process of its own, which a test may hurt: `python -c "..." SETTINGS_AS_JSON`."""

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import distopt
from distopt.coding import Batches, attachment, sharded

SAMPLES, BATCH = 48, 24
FAR_S = 1000.0  # a rank that waits for a timeout misses the test's deadline
_generator = torch.Generator().manual_seed(3)
INPUTS = torch.randn(SAMPLES, 6, dtype=torch.float64, generator=_generator)
TARGETS = (INPUTS[:, :2].sum(1, keepdim=True) > 0).double()


def build(width):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 1)).double()


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)


def sum_loss(model, samples):
    return nn.functional.binary_cross_entropy_with_logits(model(INPUTS[samples]), TARGETS[samples], reduction="sum")


def parameters(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def uncoded(width, steps):
    """The parameters after full-batch steps."""
    model = build(width)
    optimizer, batches = sgd(model), Batches(SAMPLES, BATCH)
    for step in range(steps):
        optimizer.zero_grad()
        (sum_loss(model, batches.indices(step)) / BATCH).backward()
        optimizer.step()
    return parameters(model)


class Hurt:
    """What happens to this rank: [how, step]."""

    def __init__(self, how, step, coded):
        self.how, self.step, self.coded = how, step, coded
        self.parts = 0

    def before_step(self, step):
        if step >= self.step and self.how == "sending":
            self.step = float("inf")
            threading.Thread(target=self._die_while_sending, daemon=True).start()

    def before_part(self, step):
        self.parts += step >= self.step
        if self.how == "computing" and self.parts == 2:  # the first part is done, the second one is not
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "frozen" and self.parts == 2:
            self.parts = 3
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.how == "raising" and self.parts == 1:
            raise RuntimeError("this data set is damaged")

    def _die_while_sending(self):
        transport = self.coded._transport
        others = set(range(transport.size)) - {transport.rank} if self.coded.is_master else {0}
        while not all(transport.pending_bytes(rank) > (1 << 20) for rank in others):
            time.sleep(0.0005)
        os.kill(os.getpid(), signal.SIGKILL)


def main():
    settings = json.loads(sys.argv[1])
    faulthandler.dump_traceback_later(settings["deadline_s"] - 5)
    out, rank = Path(settings["out"]), int(os.environ["RANK"])
    attachment._CLOSE_S = sharded._GOODBYE_S = FAR_S
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = build(settings["width"])
    optimizer = sgd(model)
    coding = distopt.GradientCoding(check_rules=False, deadline_s=FAR_S, **settings["config"])
    pending, seen = {}, {}
    with coding.attach(model, optimizer, batches=Batches(SAMPLES, BATCH)) as coded:
        how, at = settings["hurt"].get(str(rank), ("not", 0))
        hurt = Hurt(how, at, coded)

        def loss(part):
            hurt.before_part(part.step)
            return sum_loss(model, part.samples)

        for step in coded.steps(settings["steps"]):
            hurt.before_step(step)
            if step >= settings["slow"].get(str(rank), settings["steps"]):
                time.sleep(0.05)
            if rank == settings["watch"] and step == settings["wait_at"]:
                seen = coded.stats()
                (out / "waiting").touch()
                while not (out / "go").exists():
                    time.sleep(0.01)
            coded.backward(loss)
            optimizer.step()
            if rank == settings["watch"]:
                for other in range(coded._transport.size):
                    pending[other] = max(pending.get(other, 0), coded._transport.pending_bytes(other))
        found = {
            "parameters": parameters(model), "stats": coded.stats(), "report": coded.report(), "seen": seen,
            "pending": pending,
        }  # fmt: skip
    torch.save(found, out / f"{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
