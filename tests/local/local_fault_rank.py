"""One rank of a job of local steps to which things happen; `rank_job.Job` starts it and reads what it says."""

import contextlib
import faulthandler
import hashlib
import json
import signal
import sys
import time

import torch
from torch import nn

from distopt.config import Algorithm
from fault_facts import Rank
from listening import heard


def make_model(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))


def step(model, optimizer, seed):
    inputs = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    (model(inputs) - 1.0).square().mean().backward()
    optimizer.step()


def flat(tensors):
    return torch.cat([each.detach().reshape(-1) for each in tensors])


def digest(tensor):
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]


def main():
    """Trains a model for each of the configurations, side by side, until it is told to stop or to leave."""
    options = json.loads(sys.argv[1])
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    torch.set_num_threads(1)
    rank = Rank(options)
    with heard() as log:
        try:
            _train(rank, options)
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
    for name, described in options["algorithms"].items():
        model = make_model(number)
        optimizer = torch.optim.SGD(model.parameters(), lr=options["lr"], momentum=0.9)
        attached = Algorithm.from_dict(described).attach(model, optimizer, join=None if join is None else join[name])
        runs[name] = (model, optimizer, attached)
        rank.say(event="attached", name=name, address=attached.address, number=attached.rank, **state(attached))
        listen(rank, name, attached)
    count = 0
    while not rank.is_told("stop") and not rank.is_told(f"leave-{options['label']}"):
        for model, optimizer, _ in runs.values():
            step(model, optimizer, 1000 * number + count)
        count += 1
        rank.say(event="steps", count=count, rounds={name: run[2]._outer.done for name, run in runs.items()})
        time.sleep(options.get("pause_s", 0.01))
    for name, (_, _, attached) in runs.items():
        attached.detach()
        rank.say(event="ended", name=name, stats=attached.stats(), step=attached.step)
    if join is None:
        with contextlib.suppress(Exception):
            torch.distributed.destroy_process_group()


def state(attached):
    theta = torch.cat([each.fragment.theta for each in attached._pieces])
    residuals = [each.fragment.residual for each in attached._pieces]
    momenta = [each.fragment.momentum for each in attached._pieces]
    return {
        "done": attached._outer.done,
        "step": attached.step,
        "theta": digest(theta),
        "model_is_theta": torch.equal(flat(p for each in attached._pieces for p in each.parameters), theta),
        "residual": 0.0 if residuals[0] is None else float(torch.cat(residuals).abs().sum()),
        "momentum": "" if momenta[0] is None else digest(torch.cat(momenta)),
        "members": list(attached._outer.exchange.members),
    }


def listen(rank, name, attached):
    """Has each exchange and each return reported, from where they happen."""
    outer, come_back = attached._outer, attached._come_back
    perform, exchanged = outer.perform, outer._exchanged
    senders = []

    def report_exchanged(crew, number, contribution):
        result = exchanged(crew, number, contribution)
        idle = outer._idle[2] if outer._idle is not None and outer._idle[:2] == (crew.identity, number) else ()
        senders[:] = [each for each in crew.members if each not in idle]
        return result

    def report_performed(contribution):
        senders.clear()
        own = None
        if contribution is not None:
            place = contribution.number % len(attached._pieces)
            piece = attached._pieces[place]
            own = [each for each in attached._flights if attached._number_of(each.sending) == contribution.number]
            own = piece.local() if own[0].local is None else own[0].local
        outcome = perform(contribution)
        theta = torch.cat([each.fragment.theta for each in attached._pieces])
        rank.say(
            event="exchange", name=name, done=outer.done, theta=digest(theta), senders=list(senders),
            restarted=outcome.restarted, own=None if own is None else own.tolist(), after=theta.tolist(),
        )  # fmt: skip
        return outcome

    def report_return(outcome):
        come_back(outcome)
        rank.say(event="returned", name=name, **state(attached))

    outer.perform, outer._exchanged, attached._come_back = report_performed, report_exchanged, report_return
