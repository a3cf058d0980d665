"""What ranks run for the tests of how gossip is executed."""

import copy
import json
import time
from pathlib import Path

import torch
import torch.distributed as dist
from gossip_rank import batches, flat, make_model, make_optimizer, step
from torch import nn

from distopt.gossip import Gossip


def waiting_for_nobody(described, steps, lr=0.1, save=None, pace_s=0.002):
    """What is left of the mean that the ranks' updates make, and what each has done.

    Every rank takes another number of steps at another pace. With `save`, the second half is another attachment's,
    which takes the state of the first.
    """
    import distopt

    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    model = make_model()
    start, given = flat(model), batches(size)
    moved = torch.zeros_like(start)
    before = torch.zeros_like(start)

    def prepared(model):
        optimizer = make_optimizer(model.parameters(), 0.5, lr)

        def look(*_):
            before.copy_(flat(model))

        def count(*_):
            moved.add_(flat(model) - before)

        optimizer.register_step_pre_hook(look)
        optimizer.register_step_post_hook(count)
        return optimizer, Gossip.from_dict(described).attach(model, optimizer)

    optimizer, attached = prepared(model)
    for number in range(steps + 5 * rank):
        if save is not None and number == steps // 2:
            distopt.checkpoint.save(attached, save)
            kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            dist.barrier()
            attached.detach()
            model = make_model()
            model.load_state_dict(kept)
            optimizer, attached = prepared(model)
            distopt.checkpoint.load(attached, save)
        step(model, optimizer, given.of(rank, number))
        time.sleep(pace_s * (rank + 1))
    attached.flush()
    state = attached._participant.state_dict()["rule"][0]
    weight = float(state["weight"]) if "weight" in state else 1.0
    found = {
        "sum": flat(model) + state.get("bias", torch.zeros(1, 1))[0],
        "weight": weight,
        "expected": start + moved,
        "round": attached._exchange.round,
        **attached.stats(),
    }
    distance = attached.consensus_distance()
    attached.detach()
    return {**found, "distance": distance}


def one_behind_the_other(described, steps):
    """Rank 1 takes all its steps when rank 0 has taken all of its own."""
    rank = dist.get_rank()
    torch.manual_seed(rank)
    model = make_model()
    optimizer, given = make_optimizer(model.parameters()), batches(2)
    attached = Gossip.from_dict(described).attach(model, optimizer)
    if rank == 1:
        dist.barrier()
    for number in range(steps):
        step(model, optimizer, given.of(rank, number))
    if rank == 0:
        dist.barrier()
    attached.flush()
    found = {**attached.stats(), "round": attached._exchange.round}
    attached.detach()
    return found


# -- loops that users have --------------------------------------------------------------------------------------------

LOOPS = ("accumulation", "clipping", "scheduler", "scaler", "scaler overlapped", "compiled", "Adam")


class Loop:
    """A model with all that a loop of this kind has."""

    def __init__(self, kind, model):
        self.kind, self.model = kind, model
        make = torch.optim.Adam if kind == "Adam" else torch.optim.SGD
        self.optimizer = make(model.parameters(), lr=0.05)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if kind.startswith("scaler") else None
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.5) if kind == "scheduler" else None
        self.forward = torch.compile(model, backend="eager") if kind == "compiled" else model

    def step(self, batch, overflows):
        self.optimizer.zero_grad()
        for part in range(2 if self.kind == "accumulation" else 1):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.scaler is not None):
                half = slice(part * 5, part * 5 + 5) if self.kind == "accumulation" else slice(None)
                loss = nn.functional.cross_entropy(self.forward(batch[0][half]), batch[1][half])
            if overflows:
                loss = loss * float("inf")
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if self.kind == "clipping":
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if self.scheduler is not None:
            self.scheduler.step()


def loops(kinds, steps):
    """Each loop with gossip on a complete graph, against the same loop with a plain average written by hand behind it.

    In loops with a scaler, rank 1 skips its third step, and nobody waits for it.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    given, numbers = batches(size), {}
    for kind in kinds:
        torch.manual_seed(rank)
        plain = Loop(kind, make_model().float())
        loop = Loop(kind, copy.deepcopy(plain.model))
        overlapped = kind.endswith("overlapped")
        gossip = Gossip(topology="complete", correction="off", exchange="overlapped" if overlapped else "synchronous")
        with gossip.attach(loop.forward, loop.optimizer, scaler=loop.scaler) as attached:
            for number in range(steps):
                batch = given.of(rank, number)
                batch = (batch[0].float(), batch[1])
                skips = loop.scaler is not None and (rank, number) == (1, 2)
                loop.step(batch, skips)
                if overlapped:
                    continue
                plain.step(batch, skips)
                with torch.no_grad():
                    for parameter in plain.model.parameters():
                        dist.all_reduce(parameter)
                        parameter.div_(size)
                torch.testing.assert_close(flat(loop.model), flat(plain.model), rtol=1e-5, atol=1e-6, msg=kind)
            stats = attached.stats()
        if loop.scaler is not None:
            assert loop.scaler.get_scale() == 8.0 / (1 + (rank == 1)), "only the one that skipped"
            assert "step" not in vars(loop.scaler)
        numbers[kind] = stats["steps"], stats["exchanges"]
    return numbers


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


def policies(cases, steps):
    """For each case, whether ranks have the same of the optimizer's state and of BatchNorm's statistics."""
    rank, size = dist.get_rank(), dist.get_world_size()
    found = []
    for described, optimizer_name in cases:
        torch.manual_seed(rank)
        model = Normed().double()
        settings = {"momentum": 0.9} if optimizer_name == "SGD" else {}
        optimizer = getattr(torch.optim, optimizer_name)(model.parameters(), lr=0.01, **settings)
        given = batches(size)
        with Gossip.from_dict(described).attach(model, optimizer) as attached:
            for number in range(steps):
                step(model, optimizer, given.of(rank, number))
            if rank and steps > 1:
                model.norm.num_batches_tracked.add_(1)
            attached.flush()
        kinds = {"parameters": flat(model)}
        names = ("momentum_buffer",) if optimizer_name == "SGD" else ("exp_avg", "exp_avg_sq")
        for name in names:
            kinds[name] = torch.cat([optimizer.state[p][name].reshape(-1) for p in model.parameters()])
        for name in ("running_mean", "running_var"):
            kinds[name] = getattr(model.norm, name)
        same = {}
        for name, tensor in kinds.items():
            gathered = [torch.empty_like(tensor) for _ in range(size)]
            dist.all_gather(gathered, tensor.contiguous())
            same[name] = max(float((each - gathered[0]).abs().max()) for each in gathered)
        assert bool((model.norm.running_var > 0).all())
        found.append((same, int(model.norm.num_batches_tracked)))
    return found


def traced(path):
    """Rank 1 takes its step when rank 0 has computed: rank 0's exchange lasts for all of that."""
    from torch.profiler import ProfilerActivity, profile, record_function

    rank = dist.get_rank()
    model = make_model()
    optimizer = make_optimizer(model.parameters())
    gossip = Gossip(topology="complete", correction="off", exchange="overlapped")
    given = batches(2)
    config = torch.profiler._ExperimentalConfig(profile_all_threads=True)
    with gossip.attach(model, optimizer) as attached:
        with profile(activities=[ProfilerActivity.CPU], experimental_config=config) as profiled:
            if rank == 0:
                step(model, optimizer, given.of(rank, 0))
                time.sleep(0.5)  # until the exchange has begun, on the slowest of machines
                with record_function("compute"):
                    nn.functional.cross_entropy(model(given.of(rank, 1)[0]), given.of(rank, 1)[1]).backward()
            dist.barrier()
            if rank == 1:
                step(model, optimizer, given.of(rank, 0))
            attached.flush()
        if rank == 0:
            profiled.export_chrome_trace(str(path))
    if rank:
        return None
    events = json.loads(Path(path).read_text())["traceEvents"]
    return {
        each["name"]: (each["tid"], each["ts"], each["ts"] + each["dur"])
        for each in events
        if each.get("name") in ("compute", "distopt::gossip::exchange", "distopt::gossip::wait") and "dur" in each
    }


def on_the_gpu(described, steps):
    """Parameters that a rank has on the GPU, in a stream of its own, and on the CPU: the same, up to rounding."""
    rank, size = dist.get_rank(), dist.get_world_size()
    given, found = batches(size), []
    for device in ("cpu", "cuda"):
        torch.manual_seed(rank)
        model = make_model().to(device)
        optimizer = make_optimizer(model.parameters(), 0.5)
        with torch.cuda.stream(torch.cuda.Stream()), Gossip.from_dict(described).attach(model, optimizer) as attached:
            for number in range(steps):
                step(model, optimizer, [each.to(device) for each in given.of(rank, number)])
            attached.flush()
            found.append(flat(model).cpu())
    return found


def averaged_in_two_dtypes():
    """Layers of bfloat16 and float32, channels last; what one exchange makes of them, and what both ranks had."""
    torch.manual_seed(dist.get_rank())
    model = nn.Sequential(nn.Conv2d(2, 4, 2).to(memory_format=torch.channels_last), nn.Linear(3, 3).bfloat16())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = make_optimizer(model.parameters(), lr=0.0)
    with Gossip(topology="complete", correction="off").attach(model, optimizer) as attached:
        sum(parameter.float().sum() for parameter in model.parameters()).backward()
        optimizer.step()
        views = attached.stats()["views"]
    return before, [parameter.detach() for parameter in model.parameters()], views
