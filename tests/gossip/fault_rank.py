"""One rank of a job to which things happen; `rank_job.Job` starts it and reads what it says."""

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

import distopt
from distopt.gossip import Gossip
from fault_facts import Rank
from listening import heard

_CLONE_NEWNET = 0x40000000


def make_model(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).tolist()


def statistics(model):
    return model[1].running_mean.tolist()


def step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(6, 5, dtype=torch.float64, generator=generator)
    optimizer.zero_grad()
    (model(inputs) ** 2).mean().backward()
    optimizer.step()


def main():
    """Trains one model for each of the configurations, side by side, until told to stop.

    When an attachment has a crew of `until` ranks it makes so many more exchanges as `more` says and says where all of
    them are in the same round.
    """
    options = json.loads(sys.argv[1])
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    torch.set_num_threads(1)
    if options.get("namespace"):
        with Path("/run/netns", options["namespace"]).open() as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
    rank = Rank(options)
    with heard() as log:
        try:
            (_train_and_save if "steps" in options else _train)(rank, options)
        except BaseException as error:
            rank.say(event="failed", error=f"{type(error).__name__}: {error}")
            raise
        finally:
            rank.say(event="log", lines=[message for level, message in log if level == "WARNING"])


def _train(rank, options):
    number, join = options["number"], options.get("join")
    if join is None:
        torch.distributed.init_process_group("gloo")
    runs = {}
    for place, (name, described) in enumerate(options["algorithms"].items()):
        model = make_model(100 * number + place)
        optimizer = torch.optim.SGD(model.parameters(), lr=options["lr"])
        before = flat(model)
        attached = Gossip.from_dict(described).attach(model, optimizer, join=None if join is None else join[name])
        runs[name] = (model, optimizer, attached)
        members = attached.stats()["members"]
        rank.say(
            event="attached", name=name, address=attached.address, members=members, number=attached._assembly.number
        )
        rank.say(event="began", name=name, before=before, model=flat(model), statistics=statistics(model))
        _report_crews(rank, name, model, attached)
    target = dict.fromkeys(runs)
    reported = set()
    count = 0
    while not rank.is_told("stop"):
        for name, (model, optimizer, attached) in runs.items():
            exchange = attached._exchange
            if attached.algorithm.exchange == "overlapped":
                attached.flush()  # else it depends on a thread in which round this is
            crew = exchange._crew
            if target[name] is None and crew is not None and len(crew.members) == options.get("until", -1):
                target[name] = crew.round + options["more"]
            goes_on = target[name] is None or exchange.round < target[name]
            if "flush_after" in options:
                goes_on = count < options["flush_after"]
            if goes_on:
                step(model, optimizer, 1000 * number + count)
            elif name not in reported:
                reported.add(name)
                attached.flush()
                states = [
                    {key: value.tolist() for key, value in each.items()} for each in attached._participant._states
                ]
                rank.say(event="reached", name=name, round=exchange.round, model=flat(model), states=states,
                         stats=attached.stats())  # fmt: skip
        count += 1
        if count % 4 == 0:
            rank.say(event="steps", count=count, rounds={name: run[2]._exchange.round for name, run in runs.items()})
        time.sleep(options.get("pause_s", 0.002))
    for name, (model, _, attached) in runs.items():
        attached.detach()
        rank.say(event="ended", name=name, model=flat(model), statistics=statistics(model), stats=attached.stats())
    if join is None:
        with contextlib.suppress(Exception):
            torch.distributed.destroy_process_group()


def _train_and_save(rank, options):
    """So many steps, with a checkpoint after half of them; `wait_at` a step it waits for its end.

    With `resume` it begins from that checkpoint.
    """
    torch.distributed.init_process_group("gloo")
    number, half = options["number"], options["steps"] // 2
    for name, described in options["algorithms"].items():
        model = make_model(number)
        optimizer = torch.optim.SGD(model.parameters(), lr=options["lr"], momentum=0.5)
        attached = Gossip.from_dict(described).attach(model, optimizer)
        folder = Path(options["checkpoints"], name)
        own = folder / f"own-{number}.pt"
        begin = 0
        if options.get("resume"):
            saved = torch.load(own)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            distopt.checkpoint.load(attached, folder)
            begin = half
        for count in range(begin, options["steps"]):
            step(model, optimizer, 1000 * number + count)
            if count + 1 == half and not options.get("resume"):
                distopt.checkpoint.save(attached, folder)
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, own)
        rank.say(event="trained", name=name, began_at=begin)
        if options.get("wait"):
            continue
        attached.detach()
        rank.say(event="ended", name=name, model=flat(model), statistics=statistics(model))
    while options.get("wait"):
        rank.is_told("")
        time.sleep(0.01)


def _report_crews(rank, name, model, attached):
    """Each later crew, with the model that this rank brings into it."""
    exchange = attached._exchange
    changed = exchange._changed

    def report(crew):
        changed(crew)
        rank.say(event="crew", name=name, members=crew.members, round=crew.round, model=flat(model),
                 statistics=statistics(model), pid=os.getpid())  # fmt: skip

    exchange._changed = report


if __name__ == "__main__":
    main()
