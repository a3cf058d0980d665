"""What an attachment tells of a step's gradients: each rank's own as the backward pass made them, and the mean."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training import DTYPES, SHAPES, Chosen, chosen_gradients, dgc, momentum_sgd, topk

import distopt
from distopt.ddp import FeedHost

RANKS = 2
CASES = [
    (distopt.Dense(), "fp32", None),
    (distopt.Dense(), "bf16", None),
    (distopt.Dense(), "fp32", 2.0**16),
    (dgc(clip=0.5), "fp32", None),
    (dgc(weight_decay="local"), "fp32", None),
    (topk(nonfinite="skip"), "fp32", 2.0**16),
]


class Heard:
    """Keeps copies of what it hears; wants every second step."""

    def __init__(self, names):
        self.names = names
        self.order = []
        self.own, self.means = {}, {}
        self.asked = 0

    def begin(self):
        self.asked += 1
        self.own, self.means = {}, {}
        self.order.append("begin")
        return self.asked % 2 == 1

    def _keep(self, into, parameters, gradients):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            assert gradient.shape == parameter.shape
            into[self.names[id(parameter)]] = gradient.detach().clone()

    def local(self, parameters, gradients):
        self.order.append("local")
        self._keep(self.own, parameters, gradients)

    def mean(self, parameters, gradients):
        self.order.append("mean")
        self._keep(self.means, parameters, gradients)

    def end(self):
        self.order.append("end")


def on_ddp(algorithm, dtype, scale):
    rank, dtype = dist.get_rank(), DTYPES[dtype]
    # unused parameters need the flag; two buckets, accumulation over two micro-batches
    model = DistributedDataParallel(Chosen(dtype), bucket_cap_mb=0.002, find_unused_parameters=True)
    optimizer = momentum_sgd(model.parameters(), weight_decay=0.1)
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    attachment = algorithm.attach(model, optimizer, scaler=scaler)
    heard = Heard({id(p): name for name, p in model.module.named_parameters()})
    handle = attachment.observe_gradients(heard)
    for step in range(4):
        if step == 3:
            handle.remove()
        for micro in range(2):
            gradients = chosen_gradients(step, micro, rank, dtype)
            if step == 2:
                gradients["block1.weight"] = None  # takes no part on any rank
            model.require_backward_grad_sync = micro == 1
            loss = model(gradients)
            (loss if scaler is None else scaler.scale(loss)).backward()
        if step in (0, 2):
            for name in SHAPES:
                sums = [
                    torch.zeros(SHAPES[name]) if step == 2 and name == "block1.weight" else
                    sum(chosen_gradients(step, micro, each, torch.float32)[name] for micro in range(2))
                    for each in range(RANKS)
                ]  # fmt: skip
                assert heard.own[name].float().equal(sums[rank]), name
                if attachment.makes_dense_mean:
                    assert heard.means[name].float().equal(sum(sums) / RANKS), name
            assert heard.order[-1] == "end"
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    assert heard.asked == 3
    assert heard.order.count("end") == 2  # the second step was not wanted
    assert (heard.order.count("mean") > 0) == attachment.makes_dense_mean
    total = torch.full((3,), 1.0 + rank)
    wait = attachment.add_up(total)
    assert (wait(), total.tolist()) == (RANKS, [3.0] * 3)
    attachment.detach()


def on_left_out_step():
    """A step with NaN is left out: it has no end, and the one behind it is heard whole."""
    model = DistributedDataParallel(Chosen())
    optimizer = momentum_sgd(model.parameters())
    with dgc(nonfinite="skip").attach(model, optimizer) as attachment:
        heard = Heard({id(p): name for name, p in model.module.named_parameters()})
        attachment.observe_gradients(heard)
        heard.asked = 1
        for step in range(3):
            gradients = chosen_gradients(step, 0, dist.get_rank(), torch.float32)
            if step == 1 and dist.get_rank() == 1:
                gradients["block0.bias"][0] = torch.nan
            heard.asked = 0  # wants it
            model(gradients).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert heard.order == ["begin", "local", "end", "begin", "begin", "local", "end"]


def on_fed_host(algorithm):
    """A host that hands its gradients over itself has the same hook."""
    model = nn.Linear(5, 3)
    parameters = dict(model.named_parameters())
    host = FeedHost(parameters, dist.group.WORLD)
    attachment = algorithm.attach_to(host, torch.optim.SGD(model.parameters(), lr=0.1))
    heard = Heard({id(p): name for name, p in parameters.items()})
    attachment.observe_gradients(heard)
    gradients = [torch.full_like(p, 1.0 + dist.get_rank()) for p in parameters.values()]
    host.exchange([*parameters.values()], gradients)
    assert all(bool((own == 1.0 + dist.get_rank()).all()) for own in heard.own.values())
    assert len(heard.own) == 2
    assert all(bool((mean == 1.5).all()) for mean in heard.means.values())
    attachment.detach()


@pytest.mark.parametrize(("algorithm", "dtype", "scale"), CASES)
def test_own_gradients_and_the_mean_are_heard_before_anything_is_done_to_them(ranks, algorithm, dtype, scale):
    ranks(RANKS)(on_ddp, algorithm, dtype, scale)


def test_a_step_that_is_left_out_has_no_end(ranks):
    ranks(RANKS)(on_left_out_step)


@pytest.mark.parametrize("algorithm", [distopt.Dense(), topk()])
def test_hosts_that_feed_the_hook_are_heard_too(ranks, algorithm):
    ranks(RANKS)(on_fed_host, algorithm)
