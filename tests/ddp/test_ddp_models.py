"""Models and layouts that break bucket-keyed hooks, on real ranks. The functions named `on_*` run on every rank."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training import (
    Chosen,
    assert_close,
    assert_equal,
    assert_same_on_all_ranks,
    chosen_gradients,
    dgc,
    error_of,
    memories_of,
    mlp,
    momentum_sgd,
    samples,
    step_on_samples,
    topk,
    values_of,
)

import distopt

# --- structures: density 1 is momentum SGD, and a sparse run keeps the ranks equal


def conv_channels_last() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 2), nn.Flatten())
    return nn.Sequential(nn.Unflatten(1, (2, 2, 4)), nn.ZeroPad2d(1), body, nn.LazyLinear(4))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


def frozen() -> nn.Module:
    model = mlp()
    model[2].weight.requires_grad_(False)
    return model


class NeverUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = mlp(), nn.Linear(16, 16)

    def forward(self, x):
        return self.used(x)


def build(structure: str) -> tuple[nn.Module, dict]:
    if structure == "channels_last":
        model = conv_channels_last()
        model(torch.zeros(2, 16))  # shapes of the lazy layer
        return model.to(memory_format=torch.channels_last), {}
    if structure == "tied":
        return Tied(), {}
    if structure == "frozen":
        return frozen(), {}
    if structure == "never used":
        torch.manual_seed(1)
        return NeverUsed(), {"find_unused_parameters": True}
    if structure == "never used, static graph":
        torch.manual_seed(1)
        return NeverUsed(), {"static_graph": True}
    if structure == "float64":
        return mlp().double(), {}
    return mlp(), {}


def groups_of(structure: str, model: nn.Module) -> list[dict]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    if structure == "not in the optimizer":
        return [{"params": trainable[1:-1]}]
    if structure == "several groups":
        return [
            {"params": trainable[:1], "momentum": 0.5, "weight_decay": 0.01},
            {"params": trainable[1:3], "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
            {"params": trainable[3:4], "momentum": 0.0, "weight_decay": 0.1},
            {"params": trainable[4:], "momentum": 0.0},
        ]
    return [{"params": trainable}]


STRUCTURES = [
    "channels_last",
    "tied",
    "frozen",
    "never used",
    "never used, static graph",
    "float64",
    "not in the optimizer",
    "several groups",
]


def on_structure(structure: str, algorithm, steps: int = 8) -> dict:
    rank = dist.get_rank()
    model, options = build(structure)
    model = DistributedDataParallel(model, bucket_cap_mb=0.002, **options)
    optimizer = momentum_sgd(groups_of(structure, model.module), weight_decay=0.02)
    attachment = algorithm.attach(model, optimizer) if algorithm else None
    dtype = next(model.parameters()).dtype
    for step in range(steps):
        x, y = samples(step, rank)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x.to(dtype)), y.to(dtype)).backward()
        optimizer.step()
    values = values_of(model.module)
    assert_same_on_all_ranks(values)
    if attachment:
        memories = memories_of(attachment)
        unsynchronised = {name for name, p in model.module.named_parameters() if not p.requires_grad}
        assert memories.keys() == values.keys() - unsynchronised
        assert all(t.dtype == torch.promote_types(dtype, torch.float32) for m in memories.values() for t in m.values())
        attachment.detach()
    return values


def on_structures() -> None:
    for structure in STRUCTURES:
        try:
            expected = on_structure(structure, None)
            assert_close(on_structure(structure, dgc(density=1.0)), expected, rtol=1e-5, atol=1e-6)
            assert_equal(on_structure(structure, distopt.Dense()), expected)
            for algorithm in (dgc(), topk(values="fp16"), dgc(clip=1.0, masking=False)):
                moved = on_structure(structure, algorithm)
                assert any(not torch.equal(moved[name], expected[name]) for name in moved)
                assert all(bool(torch.isfinite(value).all()) for value in moved.values())
        except Exception as error:
            error.add_note(f"structure: {structure}")
            raise


def test_structures_train_like_momentum_sgd_at_density_1(ranks):
    ranks(2)(on_structures)


# --- memory layouts: the same numbers whatever the order in memory

LAYOUTS = {
    "channels_last": lambda p: p.contiguous(memory_format=torch.channels_last),
    "permuted": lambda p: p.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "with gaps": lambda p: torch.zeros(*p.shape[:-1], 2 * p.shape[-1])[..., ::2].copy_(p),
    "expanded storage": lambda p: torch.cat([torch.ones(5), p.flatten()])[5:].view(p.shape),
}


def on_layout(layout, algorithm, view: bool) -> dict:
    generator = torch.Generator().manual_seed(dist.get_rank())
    shape = (6, 3, 4, 5)
    model = Chosen(shapes={"block0.weight": shape, "block1.weight": (7, 3)})
    if layout:
        model.block0.weight = nn.Parameter(LAYOUTS[layout](model.block0.weight.detach()))
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=view)
    optimizer = momentum_sgd(ddp.parameters(), weight_decay=0.1, nesterov=True)
    with algorithm.attach(ddp, optimizer) as attachment:
        for _ in range(6):
            gradients = {"block0.weight": torch.randn(shape, generator=generator)}
            gradients["block1.weight"] = torch.randn(7, 3, generator=generator)
            optimizer.zero_grad()
            ddp(gradients).backward()
            optimizer.step()
        memories = memories_of(attachment)
    return {"values": values_of(model), "memories": memories}


def on_layouts() -> None:
    for algorithm in (dgc(), topk(exchange="dense"), dgc(density=1.0), dgc(weight_decay="local")):
        for view in (False, True):
            expected = on_layout(None, algorithm, view)
            for layout in LAYOUTS:
                assert_equal(on_layout(layout, algorithm, view), expected, f"{layout} {algorithm.name} view={view}")


@pytest.mark.filterwarnings("ignore:Grad strides do not match")
def test_memory_layout_changes_nothing(ranks):
    ranks(2)(on_layouts)


# --- parameters that take part on some ranks, in some steps

WEIGHTS = [f"block{i}.weight" for i in range(8)]


def used_in(name: str, step: int, rank: int) -> bool:
    """Of block 0 always, of 1 on rank 0 only, of 2 in turns, of 3 on no rank in odd steps, of 4 never."""
    block = int(name[5])
    return {1: rank == 0, 2: (step + rank) % 2 == 0, 3: step % 2 == 0, 4: False}.get(block, True)


def on_unused(algorithm, *, view: bool, set_to_none: bool, accumulate: int, deferred: bool) -> None:
    """Mass: what was put in is what moved the parameters and what is held back; exact on small integers."""
    rank, steps, rate = dist.get_rank(), 8, 2.0**-4
    model = DistributedDataParallel(
        Chosen(), bucket_cap_mb=0.0005, find_unused_parameters=True, gradient_as_bucket_view=view
    )
    before = values_of(model.module)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    attachment = algorithm.attach(model, optimizer)
    put_in = {name: torch.zeros_like(value) for name, value in before.items()}
    for step in range(steps):
        held = memories_of(attachment)
        for micro in range(accumulate):
            gradients = chosen_gradients(step, micro, rank, torch.float32)
            if micro == 0:
                gradients = {name: g if used_in(name, step, rank) else None for name, g in gradients.items()}
            else:
                gradients = {name: None if name[5] in "1234" else g for name, g in gradients.items()}
            for name, gradient in gradients.items():
                put_in[name] += 0 if gradient is None else gradient
            with contextlib.nullcontext() if micro == accumulate - 1 else model.no_sync():
                model(gradients).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        if step % 2:  # what nobody used was not selected from
            assert_equal(memories_of(attachment)["block3.weight"], held["block3.weight"], f"step {step}")
    after = values_of(model.module)
    assert_same_on_all_ranks(after)
    for name in WEIGHTS:
        total = put_in[name].clone()
        dist.all_reduce(total)
        residual = memories_of(attachment)[name]["v"]
        dist.all_reduce(residual)
        sent = (before[name] - after[name]) / rate * 2
        assert torch.equal(sent + residual, total), (name, (sent + residual - total).abs().max())
    assert torch.equal(after["block4.weight"], before["block4.weight"])
    assert attachment.stats()["overlap"] != deferred


def on_all_unused() -> None:
    for view in (False, True):
        for set_to_none in (True, False):
            for accumulate in (1, 2):
                for algorithm in (
                    topk(exchange="allgather"),
                    topk(exchange="dense"),
                    topk(nonfinite="skip"),
                    dgc(),  # without momentum: error feedback
                ):
                    options = {"view": view, "set_to_none": set_to_none, "accumulate": accumulate}
                    try:
                        on_unused(algorithm, **options, deferred=algorithm.nonfinite == "skip")
                    except Exception as error:
                        error.add_note(f"{options} {algorithm}")
                        raise


def test_nothing_is_lost_of_parameters_that_some_or_all_ranks_did_not_use(ranks):
    ranks(2)(on_all_unused)


def on_unused_with_momentum(algorithm) -> None:
    """A parameter that no rank used stands still with its state: no momentum, no decay, as in torch without a grad."""
    rank = dist.get_rank()
    model = DistributedDataParallel(Chosen(), find_unused_parameters=True, gradient_as_bucket_view=True)
    optimizer = momentum_sgd(model.parameters(), weight_decay=0.1)
    attachment = algorithm.attach(model, optimizer)
    for step in range(6):
        gradients = chosen_gradients(step, 0, rank, torch.float32)
        if step % 2:
            gradients["block3.weight"] = gradients["block3.bias"] = None
        before, held, decay = values_of(model.module), memories_of(attachment), decays_of(attachment)
        model(gradients).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name in ("block3.weight", "block3.bias"):
            stands_still = step % 2 == 1
            after = values_of(model.module)[name]
            assert torch.equal(after, before[name]) == stands_still, (name, step)
            if stands_still:
                assert_equal(memories_of(attachment)[name], held[name])
                assert torch.equal(decays_of(attachment)[name], decay[name])
    assert_same_on_all_ranks(values_of(model.module))


def decays_of(attachment) -> dict:
    return {name: t.clone() for name, t in attachment.state_dict()["replicated"]["decay"].items()}


@pytest.mark.parametrize("algorithm", [dgc(), dgc(density=1.0), dgc(exchange="dense", clip=5.0)], ids=str)
def test_a_parameter_without_gradient_stands_still(ranks, algorithm):
    ranks(2)(on_unused_with_momentum, algorithm)


def on_late_frozen(when: str) -> None:
    rank = dist.get_rank()
    model = DistributedDataParallel(mlp(), find_unused_parameters=True)
    weight = model.module[2].weight
    optimizer = momentum_sgd(model.parameters(), weight_decay=0.1)
    if when == "before attach":
        weight.requires_grad_(False)
    attachment = dgc().attach(model, optimizer)
    if when == "while attached":
        step_on_samples(model, optimizer, 0, rank)
        weight.requires_grad_(False)
        weight.grad = None
    still = weight.detach().clone()
    for step in range(1, 4):
        step_on_samples(model, optimizer, step, rank)
    assert torch.equal(weight, still)
    weight.requires_grad_(True)
    for step in range(4, 7):
        step_on_samples(model, optimizer, step, rank)
    assert not torch.equal(weight, still)
    assert_same_on_all_ranks(values_of(model.module))
    attachment.detach()


@pytest.mark.parametrize("when", ["before attach", "while attached"])
def test_a_parameter_frozen_late_stands_still_and_trains_again_when_thawed(ranks, when):
    ranks(2)(on_late_frozen, when)


# --- groups of ranks, several models, changes to the optimizer


def on_subset(algorithm) -> str | None:
    group = dist.new_group([0, 2])
    if dist.get_rank() == 1:
        return None
    rank = group.rank()
    model = DistributedDataParallel(mlp(), process_group=group, bucket_cap_mb=0.002)
    plain = DistributedDataParallel(mlp(), process_group=group, bucket_cap_mb=0.002)
    optimizer = momentum_sgd(model.parameters(), weight_decay=0.1)
    attachment = algorithm.attach(model, optimizer)
    with model.join():
        for step in range(6 if rank else 3):  # rank 0 of the group is out of data first: rank 2 has the final model
            step_on_samples(model, optimizer, step, rank)
    assert_same_on_all_ranks(values_of(model.module), group)
    assert_same_on_all_ranks(decays_of(attachment), group)
    assert attachment.stats()["world_size"] == 2
    assert attachment.stats()["steps"] == 6
    attachment.detach()
    plain.load_state_dict(model.state_dict())
    for ddp in (model, plain):  # what is left is DDP's own average over this group
        ddp.zero_grad()
        x, y = samples(9, rank)
        nn.functional.mse_loss(ddp(x), y).backward()
    assert_equal({n: p.grad for n, p in model.named_parameters()}, {n: p.grad for n, p in plain.named_parameters()})
    return None


@pytest.mark.parametrize("algorithm", [dgc(), dgc(clip=1.0), topk()], ids=["dgc", "deferred", "topk"])
def test_custom_process_group(ranks, algorithm):
    ranks(3)(on_subset, algorithm)


def on_two_models() -> None:
    rank = dist.get_rank()

    def run(chosen: set[int]) -> list[dict]:
        algorithms = [dgc(), topk(indices="block16")]
        models = [DistributedDataParallel(mlp(seed), bucket_cap_mb=0.002) for seed in (1, 2)]
        optimizers = [momentum_sgd(model.parameters()) for model in models]
        for algorithm, model, optimizer in zip(algorithms, models, optimizers, strict=True):
            algorithm.attach(model, optimizer)
        for step in range(5):
            for i in chosen:
                optimizers[i].zero_grad()
                x, y = samples(step, rank)
                nn.functional.mse_loss(models[i](x), y).backward()
            for i in chosen:
                optimizers[i].step()
        return [values_of(model.module) for model in models]

    together, first, second = run({0, 1}), run({0}), run({1})
    assert_equal(together[0], first[0])
    assert_equal(together[1], second[1])
    assert_same_on_all_ranks(together[0])


def test_two_models_in_one_process(ranks):
    ranks(2)(on_two_models)


def on_late_group() -> str:
    rank = dist.get_rank()
    for algorithm in (dgc(), topk()):
        model = DistributedDataParallel(mlp())
        parameters = list(model.parameters())
        optimizer = momentum_sgd(parameters[:-2])
        attachment = algorithm.attach(model, optimizer)
        step_on_samples(model, optimizer, 0, rank)
        before = parameters[-2].detach().clone()
        optimizer.add_param_group({"params": parameters[-2:]})
        if isinstance(algorithm, distopt.DGC):
            message = error_of(lambda m=model, o=optimizer: step_on_samples(m, o, 1, rank), distopt.DistoptError)
            attachment.detach()
            assert [group["momentum"] for group in optimizer.param_groups] == [0.9, 0.9]
            algorithm.attach(model, optimizer)
        step_on_samples(model, optimizer, 1, rank)
        assert not torch.equal(parameters[-2], before)
        assert_same_on_all_ranks(values_of(model.module))
    return message


def test_parameter_group_added_late(ranks):
    for message in ranks(2)(on_late_group):
        assert message.startswith("CompatibilityError: ")
        for part in ("momentum must stay 0", "0.9", "parameter group 1", "add_param_group", "detach and attach again"):
            assert part in message


def on_sparse_embedding() -> list[str]:
    messages = []
    for algorithm in (dgc(), topk(), distopt.Dense()):
        model = DistributedDataParallel(nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 4)))
        optimizer = momentum_sgd(model.parameters())
        messages.append(error_of(lambda a=algorithm, m=model, o=optimizer: a.attach(m, o), distopt.CompatibilityError))
    return messages


def test_sparse_embedding_gradients_are_refused(ranks):
    for messages in ranks(2)(on_sparse_embedding):
        for message in messages:
            for part in ("dense", "sparse=True", "'0'", "set sparse=False"):
                assert part in message
