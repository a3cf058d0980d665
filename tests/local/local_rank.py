"""What ranks run for the tests of local steps."""

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from distopt.config import Algorithm
from distopt.gossip import NodeBatches

_rng = np.random.default_rng(0)
INPUTS = torch.from_numpy(_rng.standard_normal((240, 6)).astype("float32"))
LABELS = (INPUTS[:, 0] > 0).long() + (INPUTS[:, 1] > 0).long()


def make_model():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def make_plain():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batches(nodes):
    return NodeBatches((INPUTS, LABELS), np.array_split(np.arange(240), nodes), 10, seed=3)


def flat(tensors):
    return torch.cat([each.detach().reshape(-1) for each in tensors])


def step(model, optimizer, batch):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def theta_of(attached):
    return torch.cat([each.fragment.theta for each in attached._pieces]).clone()


def residual_of(attached):
    residuals = [each.fragment.residual for each in attached._pieces]
    return torch.cat([torch.zeros_like(p.fragment.theta) if r is None else r.clone()
                      for p, r in zip(attached._pieces, residuals, strict=True)])  # fmt: skip


def trained(described, steps, *, make=make_model, lr=0.05, momentum=0.9, observer=None):
    """This rank's model, theta, residual and numbers after the steps; the ranks' models differ before."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    given = batches(size)
    with Algorithm.from_dict(described).attach(model, optimizer) as attached:
        heard = None if observer is None else observer()
        if heard is not None:
            attached.observe_gradients(heard)
        for number in range(steps):
            step(model, optimizer, given.of(rank, number))
        attached.flush()
        return {
            "model": flat(model.parameters()),
            "buffers": [each.clone() for each in model.buffers()],
            "theta": theta_of(attached),
            "residual": residual_of(attached),
            "stats": attached.stats(),
            "heard": None if heard is None else heard.heard,
        }


def counted(described, steps):
    """What the numbers say this rank has put on the link, and what its sends were given."""
    from distopt.comm.crew.point_to_point import Messages

    passed, original = [], Messages._begin

    def begin(self, place, operation, tensor):
        if operation.__name__ == "send":
            passed.append(tensor.nbytes)
        original(self, place, operation, tensor)

    Messages._begin = begin
    try:
        found = trained(described, steps)
    finally:
        Messages._begin = original
    return found["stats"], sum(passed)


class Sum:
    """Adds up the pseudo-gradients of this rank, and their means."""

    def __init__(self):
        self._counts = {"begun": 0, "ended": 0}
        self._sums = {"local": {}, "mean": {}}

    def begin(self):
        self._counts["begun"] += 1
        return True

    def local(self, parameters, gradients):
        self._add("local", parameters, gradients)

    def mean(self, parameters, gradients):
        self._add("mean", parameters, gradients)

    def _add(self, what, parameters, gradients):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            assert parameter.shape == gradient.shape
            self._sums[what][id(parameter)] = self._sums[what].get(id(parameter), 0.0) + gradient.clone()

    def end(self):
        self._counts["ended"] += 1

    @property
    def heard(self):
        sums = {what: flat(found.values()) if found else 0.0 for what, found in self._sums.items()}
        return {**self._counts, **sums}


def deltas(described, steps):
    torch.manual_seed(0)
    start = flat(make_model().parameters())
    found = trained(described, steps, observer=Sum)
    return {"deltas": found["heard"]["local"], "start": start, **found}


class Loop:
    """A training whose model is of some dtype, or whose scaler skips a step on one rank."""

    def __init__(self, kind):
        self.rank, size = dist.get_rank(), dist.get_world_size()
        self.kind, self.given = kind, batches(size)
        torch.manual_seed(self.rank)
        self.model = make_model()
        if kind in ("bfloat16", "float64"):
            self.model = self.model.to(getattr(torch, kind))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.02)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3) if kind == "scaler" else None

    def parts(self):
        scaler = {} if self.scaler is None else {"scaler": self.scaler}
        return {"model": self.model, "optimizer": self.optimizer, **scaler}

    def run(self, attached, start, stop):
        for number in range(start, stop):
            if number == 5:
                attached.outer_lr = 0.6
            inputs, labels = self.given.of(self.rank, number)
            self.optimizer.zero_grad()
            dtype = next(self.model.parameters()).dtype
            loss = nn.functional.cross_entropy(self.model(inputs.to(dtype)), labels)
            if self.scaler is None:
                loss.backward()
                self.optimizer.step()
                continue
            self.scaler.scale(loss).backward()
            if number in (3, 9) and self.rank == 1:
                next(self.model.parameters()).grad.fill_(torch.inf)
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def result(self, attached):
        attached.shared_state_dict()  # waits for what is under way, which moves theta
        return {
            "model": flat(self.model.parameters()).clone(),
            "theta": theta_of(attached),
            "residual": residual_of(attached),
            "buffers": [each.tolist() for each in self.model.buffers()],
            "step": attached.step,
        }


def saved_and_whole(described, kind, folder):
    """15 steps, with a checkpoint after 7 where there is a folder for it."""
    import distopt

    loop = Loop(kind)
    with Algorithm.from_dict(described).attach(loop.model, loop.optimizer, scaler=loop.scaler) as attached:
        loop.run(attached, 0, 7)
        under_way = attached.stats()["under_way"]
        if folder is not None:
            distopt.checkpoint.save(attached, folder)
            parts = {name: part.state_dict() for name, part in loop.parts().items()}
            torch.save(parts, f"{folder}/own-{loop.rank}.pt")
        loop.run(attached, 7, 15)
        return {"under_way": under_way, **loop.result(attached)}


def resumed(described, kind, folder):
    """The last 8 steps, in new objects."""
    import distopt

    loop = Loop(kind)
    states = torch.load(f"{folder}/own-{loop.rank}.pt")
    for name, part in loop.parts().items():
        part.load_state_dict(states[name])
    with Algorithm.from_dict(described).attach(loop.model, loop.optimizer, scaler=loop.scaler) as attached:
        distopt.checkpoint.load(attached, folder)
        loop.run(attached, 7, 15)
        return loop.result(attached)


def refused_state(case):
    """What a process alone says of a state that does not fit, and whether nothing has changed."""
    from distopt.errors import StateMismatchError
    from distopt.local import SparseLoCo

    def attached_to(model, **changed):
        settings = {"inner_steps": 2, "chunk": 16, "k": 4, **changed}
        return SparseLoCo(**settings).attach(model, torch.optim.SGD(model.parameters(), lr=0.1))

    others = {"model": nn.Linear(6, 3), "buffers": nn.Sequential(*make_model(), nn.BatchNorm1d(3, affine=False))}
    with attached_to(others.get(case, make_model()), **({"k": 3} if case == "configuration" else {})) as attached:
        state = attached.state_dict()
    if case == "ranks":
        state["world_size"] = 2
    if case == "place":
        state["ranks"] = {7: state["ranks"][0]}
    model = make_model() if case != "model" else nn.Linear(6, 4)
    with attached_to(model) as attached:
        before = flat(model.parameters()).clone()
        try:
            attached.load_state_dict(state)
        except StateMismatchError as error:
            return f"StateMismatchError: {error}", torch.equal(before, flat(model.parameters()))
    return "nothing", True


def refused(case):
    """What attach, or the first steps, say on this rank."""
    from distopt.errors import DistoptError
    from distopt.local import SparseLoCo

    rank = dist.get_rank()
    settings = {"inner_steps": 2, "chunk": 16, "k": 4, "fragments": 9 if case == "too many fragments" else 1}
    settings["k"] -= case == "another configuration on rank 1" and rank == 1
    settings["inner_steps"] += 8 if case == "too many fragments" else 0
    model = {
        "complex": lambda: nn.ParameterList([nn.Parameter(torch.zeros(3, dtype=torch.complex64))]),
        "lazy": lambda: nn.Sequential(nn.Linear(6, 3), nn.LazyLinear(3)),
        "another model on rank 1": lambda: nn.Linear(6, 3 + rank),
        "another buffer on rank 1": lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3 + rank, affine=False)),
    }.get(case, lambda: nn.Linear(6, 3))()
    if case == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    own = nn.Linear(6, 3) if case == "another optimizer" else model
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
    attached = None
    try:
        attached = SparseLoCo(**settings).attach(model, optimizer)
        if case == "outer_lr":
            attached.outer_lr = 0.0
        if case == "twice":
            SparseLoCo(**settings).attach(model, optimizer)
        if case == "loaded afterwards" and rank == 1:
            model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
            step(model, optimizer, (INPUTS[:4], LABELS[:4]))
        if case == "moved":
            model.double()
            for _ in range(2):
                step(model, optimizer, (INPUTS[:4].double(), LABELS[:4]))
    except DistoptError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        if attached is not None:
            attached._release(farewell=False)
    return "nothing"


def with_own_outer_lr(described, steps):
    rank, size = dist.get_rank(), dist.get_world_size()
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    given = batches(size)
    with Algorithm.from_dict(described).attach(model, optimizer) as attached:
        attached.outer_lr = 0.5 + 0.1 * rank
        for number in range(steps):
            step(model, optimizer, given.of(rank, number))
        return theta_of(attached)


def caught():
    """Rank 1's model is not finite once, and its loop catches that: what its steps say, and who is left."""
    from distopt.errors import DistoptError
    from distopt.local import SparseLoCo

    rank, model, said = dist.get_rank(), make_plain(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with SparseLoCo(inner_steps=2, chunk=16, k=4, overlap=1, fragments=2).attach(model, optimizer) as attached:
        for number in range(6):
            if number == 2 and rank == 1:
                with torch.no_grad():
                    next(model.parameters())[0, 0] = torch.nan
            try:
                step(model, optimizer, batches(2).of(rank, number))
            except DistoptError as error:
                said.append(f"{type(error).__name__}: {error}")
        return said, attached.stats()["members"], attached.stats()["exchanges"]


def warned(described, *, same):
    """The warnings of a training on this rank's data, or on the same on all ranks."""
    from listening import heard

    torch.manual_seed(0)
    model = make_plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with heard() as log, Algorithm.from_dict(described).attach(model, optimizer):
        for number in range(12):
            step(model, optimizer, batches(2).of(0 if same else dist.get_rank(), number))
            optimizer.param_groups[0]["lr"] = 0.05 * (number > 3)  # that nobody learns is no sign of it
    return [message for level, message in log if level == "WARNING"]


def given_back():
    """Hooks of the optimizer after detach, whether the scaler has its own step, and who took part."""
    from distopt.local import SparseLoCo

    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu")
    with SparseLoCo(inner_steps=2).attach(model, optimizer, scaler=scaler) as attached:
        assert "step" in vars(scaler)
        members = attached.stats()["members"]
    return len(optimizer._optimizer_step_post_hooks), "step" not in vars(scaler), members
