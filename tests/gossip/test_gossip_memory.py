"""What an attached model's memory looks like to the user: views of one vector, saved, loaded, copied and moved."""

import copy
import io
import threading

import pytest
import torch
from torch import nn

import distopt
from distopt.errors import CompatibilityError, PeerLostError
from distopt.gossip import Gossip


class Words(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        self.words = nn.Embedding(50, 8, sparse=sparse)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.words(x).mean(1))


def make(*, sparse=None, **settings):
    """A model, its optimizer and a lone rank's attachment; a step goes through all of an exchange."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 3)) if sparse is None else Words(sparse)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, Gossip(**settings).attach(model, optimizer)


def step(model, optimizer):
    inputs = torch.randint(50, (4, 5)) if isinstance(model, Words) else torch.randn(4, 6)
    optimizer.zero_grad()
    model(inputs).square().mean().backward()
    optimizer.step()


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def storages(model):
    return len({parameter.untyped_storage().data_ptr() for parameter in model.parameters()})


def test_a_saved_model_is_as_large_as_before_and_loads_anywhere():
    model, _, attached = make()
    plain = len(saved(copy.deepcopy(model).state_dict()))
    whole = saved(model.state_dict())
    assert storages(model) == 1
    assert len(whole) <= plain
    other = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 3))
    other.load_state_dict(torch.load(io.BytesIO(whole), weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    # A part of the model brings the whole vector with it, unless it is cloned: see the docs.
    part = model[2].state_dict()
    cloned = {name: tensor.clone() for name, tensor in part.items()}
    assert len(saved(part)) > 1.5 * len(saved(cloned))
    attached.detach()
    assert storages(model) == 4
    assert len(saved(model[2].state_dict())) < 1.1 * len(saved(cloned))


def test_what_is_loaded_goes_into_the_views():
    model, _, attached = make()
    state = {name: torch.full_like(tensor, 2.0) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    assert attached.stats()["views"]
    assert torch.equal(attached._vectors[0].vector, torch.full_like(attached._vectors[0].vector, 2.0))
    attached.detach()


def test_a_copy_has_memory_of_its_own():
    model, optimizer, attached = make()
    other = copy.deepcopy(model)
    before = [parameter.clone() for parameter in other.parameters()]
    step(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))
    assert storages(other) == 4
    attached.detach()


def test_parameters_whose_memory_was_replaced_are_copied_and_stats_say_so():
    model, optimizer, attached = make()
    model[0].weight.data = torch.zeros(64, 6)
    step(model, optimizer)
    assert not attached.stats()["views"]
    assert torch.equal(attached._vectors[0].vector[0, : 64 * 6].view(64, 6), model[0].weight)
    attached.detach()


def test_a_model_of_another_dtype_than_at_attach_is_refused():
    model, optimizer, attached = make()
    model.double()
    model(torch.randn(4, 6).double()).sum().backward()
    with pytest.raises(CompatibilityError, match=r"got '0.weight' of torch.float64 .* move it first, then attach"):
        optimizer.step()
    attached._release()


@pytest.mark.parametrize("how", ["added", "thawed"])
def test_parameters_that_are_trained_later_are_refused(how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 3))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = Gossip().attach(model, optimizer)
    frozen = model[0].weight.clone()
    step(model, optimizer)
    assert torch.equal(model[0].weight, frozen)
    if how == "added":
        optimizer.add_param_group({"params": nn.Linear(2, 2).parameters()})
    else:
        model[0].requires_grad_(True)
    with pytest.raises(CompatibilityError, match=r"parameters that it had at attach.*detach, and attach again"):
        step(model, optimizer)
    attached.detach()
    attached = Gossip().attach(model, optimizer)
    step(model, optimizer)
    attached.detach()


def test_sparse_gradients_are_taken_where_nothing_needs_them_dense():
    model, optimizer, attached = make(sparse=True)
    before = model.words.weight.clone()
    step(model, optimizer)
    assert model.words.weight.grad.is_sparse
    assert not torch.equal(model.words.weight, before)
    attached.detach()
    model, optimizer, attached = make(sparse=True, mixing="gradient-tracking", topology="ring")
    with pytest.raises(
        CompatibilityError, match=r"dense ones, got that of 'words.weight' .*sparse=False, or use mixing"
    ):
        step(model, optimizer)
    attached.detach()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(6, 3), nn.LazyLinear(3)), "got '1.weight' that is lazy; run a batch"),
        (lambda: nn.Linear(6, 3, device="meta"), "got 'weight' that is on meta; .* before you attach"),
        (lambda: nn.Sequential(FullyShardedDataParallel(6, 3)), "got a FullyShardedDataParallel.*; use gossip between"),
    ],
)
def test_parameters_that_are_not_whole_or_not_there_are_refused(model, message):
    model = model()
    with pytest.raises(CompatibilityError, match=message):
        Gossip().attach(model, torch.optim.SGD(model.parameters(), lr=0.1))


class FullyShardedDataParallel(nn.Linear):
    """Of the name that is refused."""


def test_a_model_is_attached_once():
    model, optimizer, attached = make()
    with pytest.raises(CompatibilityError, match=r"got '0.weight' that another attachment averages; detach that first"):
        Gossip().attach(model, optimizer)
    attached.detach()
    Gossip().attach(model, optimizer).detach()


def test_a_fused_optimizer_unscales_too_late_for_rules_that_change_gradients():
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    gossip = Gossip(topology="ring", mixing="quasi-global-momentum")
    with pytest.raises(CompatibilityError, match=r"got a fused SGD with a scaler, .*use fused=False"):
        gossip.attach(model, optimizer, scaler=torch.amp.GradScaler("cpu"))


def test_a_step_past_the_scaler_does_not_hide_the_next_skip():
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    attached = Gossip().attach(model, optimizer, scaler=scaler)
    step(model, optimizer)
    optimizer.zero_grad()
    scaler.scale(model(torch.randn(4, 6)).sum() * float("inf")).backward()
    scaler.step(optimizer)
    assert scaler.get_scale() == 8.0
    scaler.update()
    assert scaler.get_scale() == 4.0  # skipped
    assert attached.stats()["steps"] == attached.stats()["exchanges"] == 2
    attached.detach()


def test_the_ratio_is_in_the_numbers_where_something_is_corrected():
    model, optimizer, attached = make(correction="on")
    assert attached.stats()["variance_ratio"] is None
    step(model, optimizer)
    assert attached.stats()["variance_ratio"] == 1.0  # a lone rank loses nothing
    attached.detach()
    model, optimizer, attached = make(correction="off")
    step(model, optimizer)
    assert attached.stats()["variance_ratio"] is None
    attached.detach()


def test_who_is_refused_leaves_nothing_behind():
    before = set(threading.enumerate())
    model = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(CompatibilityError, match="of a floating dtype, got 'weight'"):
        Gossip().attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert set(threading.enumerate()) <= before


def test_a_failure_after_the_ranks_have_met_leaves_nothing_behind(monkeypatch):
    def fails(*_):
        raise RuntimeError("not now")

    before = set(threading.enumerate())
    model = nn.Linear(2, 2)
    monkeypatch.setattr("distopt.gossip.attachment.Participant", fails)
    with pytest.raises(RuntimeError, match="not now"):
        Gossip().attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert set(threading.enumerate()) <= before
    assert storages(model) == 2


def test_an_older_checkpoint_is_gone_on_from_also_after_a_later_meeting():
    model, optimizer, attached = make()
    state = copy.deepcopy(attached.state_dict())
    for _ in range(3):
        step(model, optimizer)
    exchange = attached._exchange
    with exchange._turn:
        exchange._find_crew()
    step(model, optimizer)
    attached.load_state_dict(state)
    made = []
    exchange.perform(lambda *each: made.append(each))
    assert len(made) == 1
    assert exchange.round == 1
    attached.detach()


def test_who_joins_looks_for_the_way_to_whom_it_joins(monkeypatch):
    towards = []

    def found(host):
        towards.append(host)
        return "127.0.0.1"

    monkeypatch.setattr("distopt.comm.crew.introduction.own_address", found)
    model = nn.Linear(2, 2)
    with pytest.raises(PeerLostError, match=r"there must be a rank of the job at 127\.0\.0\.9:9"):
        Gossip().attach(model, torch.optim.SGD(model.parameters(), lr=0.1), join="127.0.0.9:9")
    assert towards == ["127.0.0.9"]


def test_who_is_left_saves_for_as_many_ranks_as_there_are(tmp_path):
    model, optimizer, attached = make(topology="ring", mixing="quasi-global-momentum")
    attached._assembly._roster.settle(2, 2, (2,))  # ranks 0 and 1 have gone
    attached._exchange._members = attached._exchange._crew.members = (2,)
    assert attached.place == (0, 1)
    step(model, optimizer)
    distopt.checkpoint.save(attached, tmp_path)
    momentum = attached.state_dict()["ranks"][0]["rule"][0]["momentum"].clone()
    attached.detach()
    _, _, attached = make(topology="ring", mixing="quasi-global-momentum")
    distopt.checkpoint.load(attached, tmp_path)
    assert torch.equal(attached.state_dict()["ranks"][0]["rule"][0]["momentum"], momentum)
    assert momentum.any()
    attached.detach()


def test_detach_gives_everything_back_also_where_an_exchange_has_failed(monkeypatch):
    before = set(threading.enumerate())
    model, optimizer, attached = make(exchange="overlapped", correction="off")

    def fails(act):
        raise PeerLostError("they have gone")

    monkeypatch.setattr(attached._participant, "_perform", fails)
    step(model, optimizer)
    with pytest.raises(PeerLostError, match="they have gone"):
        attached.detach()
    assert set(threading.enumerate()) <= before
    assert storages(model) == 4
    step(model, optimizer)


def test_a_step_without_an_exchange_does_not_look_up_rates(monkeypatch):
    model, optimizer, attached = make(topology="ring", every=3)
    asked, (vector,) = [], attached._vectors
    monkeypatch.setattr(type(vector), "by_parameter", lambda self, lr: asked.append(lr) or 0.1)
    for _ in range(7):
        step(model, optimizer)
    assert (len(asked), attached.stats()["exchanges"]) == (2, 2)
    attached.detach()
