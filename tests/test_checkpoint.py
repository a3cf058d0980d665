"""Stop, resume and move between numbers of ranks: real ranks, real files."""

import json

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt
from listening import heard

NUM_STEPS = 20


def build(algorithm, *, channels_last=False, width=24):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, width), nn.Linear(width, 4))
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    # The balanced exchange selects over a bucket; DDP rebuilds its buckets once, unless it looks for unused parameters.
    keeps_buckets = getattr(algorithm, "exchange", None) == "balanced"
    ddp = DDP(model, bucket_cap_mb=0.004, find_unused_parameters=keeps_buckets)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2)
    return ddp, optimizer, algorithm.attach(ddp, optimizer)


def train(ddp, optimizer, first, last):
    for step in range(first, last):
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
        x = torch.randn(4, 3, 6, 6, generator=generator)
        optimizer.zero_grad()
        ddp(x).square().mean().backward()
        optimizer.step()


def parameters_of(ddp):
    return [parameter.detach().clone() for parameter in ddp.parameters()]


def uninterrupted(algorithm):
    ddp, optimizer, attachment = build(algorithm)
    train(ddp, optimizer, 0, NUM_STEPS)
    return parameters_of(ddp), attachment.state_dict()


def first_half(algorithm, folder, *, with_dcp=False):
    ddp, optimizer, attachment = build(algorithm)
    train(ddp, optimizer, 0, NUM_STEPS // 2)
    torch.save(
        {"model": ddp.module.state_dict(), "optimizer": optimizer.state_dict()}, f"{folder}/{dist.get_rank()}.pt"
    )
    if with_dcp:
        dcp.save({"distopt": attachment}, checkpoint_id=f"{folder}/dcp")
    else:
        distopt.checkpoint.save(attachment, folder)
    dist.barrier()
    return held_back(attachment), velocities(attachment)


def held_back(attachment):
    entries = attachment.state_dict()["ranks"][str(dist.get_rank())]
    return {name: memory["v"].double() for name, memory in entries.items() if "v" in memory}


def velocities(attachment):
    entries = attachment.state_dict()["ranks"][str(dist.get_rank())]
    return {name: memory["u"].clone() for name, memory in entries.items() if "u" in memory}


def second_half(algorithm, folder, *, with_dcp=False):
    ddp, optimizer, attachment = build(algorithm)
    saved = torch.load(f"{folder}/{dist.get_rank()}.pt")
    ddp.module.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    if with_dcp:
        dcp.load({"distopt": attachment}, checkpoint_id=f"{folder}/dcp")
    else:
        distopt.checkpoint.load(attachment, folder)
    train(ddp, optimizer, NUM_STEPS // 2, NUM_STEPS)
    return parameters_of(ddp), attachment.state_dict()


def loaded(algorithm, folder, *, with_dcp=False, channels_last=False):
    _, _, attachment = build(algorithm, channels_last=channels_last)
    if with_dcp:
        distopt.checkpoint.load_distributed(attachment, f"{folder}/dcp")
    else:
        distopt.checkpoint.load(attachment, folder)
    return held_back(attachment), velocities(attachment), attachment.state_dict()["step"]


def said_on_load(algorithm, folder, **options):
    with heard() as said:
        loaded(algorithm, folder, **options)
    return [message for _, message in said if "resumed" in message]


DGC = distopt.DGC(density=0.05, warmup=distopt.ddp.ListWarmup(densities=(0.5,), stage=3))


@pytest.mark.parametrize(
    ("algorithm", "with_dcp"),
    [
        (DGC, False),
        (DGC, True),
        (distopt.DGC(density=0.05, values="fp16", clip=1.0), False),
        (distopt.TopK(density=0.05), False),
        (distopt.DGC(density=1.0), True),
    ],
    ids=["dgc-files", "dgc-dcp", "dgc-fp16-clip", "topk", "density-1"],
)
@pytest.mark.job
def test_resume_in_new_processes_is_bit_identical(ranks, tmp_path, algorithm, with_dcp):
    pool = ranks(2)
    whole = pool(uninterrupted, algorithm)
    pool(first_half, algorithm, str(tmp_path), with_dcp=with_dcp)
    if algorithm is DGC:
        pool.close()  # the second half runs in new processes; the other cases save the time of starting them
    resumed = pool(second_half, algorithm, str(tmp_path), with_dcp=with_dcp)
    for (expected, expected_state), (found, found_state) in zip(whole, resumed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert expected_state["step"] == found_state["step"] == NUM_STEPS
        flat_a, flat_b = flatten(expected_state), flatten(found_state)
        assert flat_a.keys() == flat_b.keys()
        assert all(torch.equal(flat_a[key], flat_b[key]) for key in flat_a)


def flatten(state, prefix=""):
    tensors = {}
    for key, value in state.items():
        if isinstance(value, dict):
            tensors |= flatten(value, f"{prefix}{key}/")
        elif isinstance(value, torch.Tensor):
            tensors[f"{prefix}{key}"] = value
    return tensors


@pytest.mark.parametrize("exchange", ["auto", "balanced", "hierarchical"])
def test_resume_is_bit_identical_on_every_route(ranks, tmp_path, exchange):
    """Also where the route depends on a measured link: what was measured travels with the state."""
    algorithm = distopt.DGC(density=0.05, exchange=exchange, ranks_per_node=2)
    expected = ranks(4)(uninterrupted, algorithm)
    ranks(4)(first_half, algorithm, str(tmp_path))
    resumed = ranks(4)(second_half, algorithm, str(tmp_path))
    if exchange == "auto":
        assert {state["prediction"] for _, state in resumed} == {measured(tmp_path)}
        return  # the uninterrupted run has measured for itself
    for (parameters, state), (same, other) in zip(expected, resumed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(parameters, same, strict=True))
        ((_, memories),) = state["ranks"].items()
        ((_, others),) = other["ranks"].items()
        for name, memory in memories.items():
            assert all(torch.equal(tensor, others[name][key]) for key, tensor in memory.items())


def measured(folder):
    """What the saved routes were chosen by."""
    (path,) = folder.glob("distopt-00000-*.pt")
    return torch.load(path)["prediction"]


@pytest.mark.parametrize("with_dcp", [False, True], ids=["files", "dcp"])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_another_world_size_keeps_the_sum_of_what_was_held_back(ranks, tmp_path, num_ranks, with_dcp):
    before = ranks(2)(first_half, DGC, str(tmp_path), with_dcp=with_dcp)
    lines, *others = ranks(num_ranks)(said_on_load, DGC, str(tmp_path), with_dcp=with_dcp)
    assert lines == [f"resumed 2 ranks on {num_ranks}: held-back gradients are redistributed, their sum is kept"]
    assert not any(others)
    after = ranks(num_ranks)(loaded, DGC, str(tmp_path), with_dcp=with_dcp)
    for name in before[0][0]:
        expected = sum(v[name] for v, _ in before)
        assert expected.abs().sum() > 0
        torch.testing.assert_close(sum(v[name] for v, _, _ in after), expected, rtol=1e-6, atol=1e-7)
    for name in before[0][1]:
        mean = (before[0][1][name] + before[1][1][name]) / 2
        for _, u, step in after:
            torch.testing.assert_close(u[name], mean)
            assert step == NUM_STEPS // 2


def test_a_model_in_another_memory_format_takes_the_state(ranks, tmp_path):
    before = ranks(2)(first_half, DGC, str(tmp_path))
    after = ranks(2)(loaded, DGC, str(tmp_path), channels_last=True)
    for (v, _), (v_loaded, _, _) in zip(before, after, strict=True):
        assert all(torch.equal(v[name], v_loaded[name]) for name in v)


def load_other_model(algorithm, folder):
    _, _, attachment = build(algorithm, width=20)
    with pytest.raises(distopt.StateMismatchError) as raised:
        distopt.checkpoint.load(attachment, folder)
    return str(raised.value)


def test_state_of_another_model_is_refused_by_name_and_shape(ranks, tmp_path):
    ranks(2)(first_half, DGC, str(tmp_path))
    for message in ranks(2)(load_other_model, DGC, str(tmp_path)):
        assert "'3.weight'" in message
        assert "(20, 128)" in message
        assert "(24, 128)" in message


def test_state_of_another_algorithm_is_refused(ranks, tmp_path):
    ranks(2)(first_half, DGC, str(tmp_path))
    for message in ranks(2)(refused, distopt.TopK(density=0.05), str(tmp_path)):
        assert "must be of algorithm 'topk', got 'dgc'" in message


def refused(algorithm, folder, *, without_momentum=False):
    ddp, optimizer, attachment = build(algorithm)
    if without_momentum:
        attachment.detach()
        optimizer.param_groups[0].update(momentum=0.0, nesterov=False)
        attachment = algorithm.attach(ddp, optimizer)
    with pytest.raises(distopt.StateMismatchError) as raised:
        distopt.checkpoint.load(attachment, folder)
    return str(raised.value)


def changed(setting, folder):
    """Attaches with one setting of the optimizer changed from what was saved, and loads."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 24), nn.Linear(24, 4))
    ddp = DDP(model, bucket_cap_mb=0.004)
    settings = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2} | setting
    attachment = DGC.attach(ddp, torch.optim.SGD(ddp.parameters(), **settings))
    with pytest.raises(distopt.StateMismatchError) as raised:
        distopt.checkpoint.load(attachment, folder)
    return str(raised.value)


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ({"nesterov": False}, "nesterov of '0.weight' must be the saved True, got False"),
        ({"weight_decay": 0.0}, "weight decay of '0.weight' must have a momentum, as the saved 0.01 has, got 0.0"),
        ({"momentum": 0.8}, "momentum of '0.weight' must be the saved 0.9, got 0.8"),
    ],
    ids=["nesterov", "decay", "momentum"],
)
def test_settings_that_the_state_depends_on_must_be_the_saved_ones(ranks, tmp_path, setting, part):
    ranks(2)(first_half, DGC, str(tmp_path))
    for message in ranks(2)(changed, setting, str(tmp_path)):
        assert part in message
        assert "attach before optimizer.load_state_dict" in message


def paused_half(algorithm, folder):
    """The second half, from the checkpoint of the first, as `algorithm` that sends whole or as DGC paused."""
    ddp, optimizer, attachment = build(DGC if algorithm is None else algorithm)
    saved = torch.load(f"{folder}/{dist.get_rank()}.pt")
    ddp.module.load_state_dict(saved["model"])
    distopt.checkpoint.load(attachment, folder)
    if algorithm is None:
        attachment.pause()
    train(ddp, optimizer, NUM_STEPS // 2, NUM_STEPS)
    assert not any(v.any() for v in held_back(attachment).values())
    return parameters_of(ddp)


@pytest.mark.parametrize(
    "algorithm", [distopt.DGC(density=1.0), distopt.DGC(density=0.05, skip=("*",))], ids=["density-1", "skip"]
)
def test_a_run_may_be_finished_dense_and_sends_what_was_held_back(ranks, tmp_path, algorithm):
    before = ranks(2)(first_half, DGC, str(tmp_path))
    assert any(v.any() for v in before[0][0].values())
    expected = ranks(2)(paused_half, None, str(tmp_path))
    found = ranks(2)(paused_half, algorithm, str(tmp_path))
    for a, b in zip(expected[0], found[0], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize(("values", "then"), [("fp16", "fp32"), ("fp32", "fp16")])
def test_another_wire_keeps_what_was_held_back(ranks, tmp_path, values, then, num_ranks):
    before = ranks(2)(first_half, distopt.DGC(density=0.05, values=values), str(tmp_path))
    after = ranks(num_ranks)(loaded, distopt.DGC(density=0.05, values=then), str(tmp_path))
    if values == "fp16":
        assert any(v[name].any() for v, _ in before for name in v if name.endswith("bias"))
    for name in before[0][0]:
        expected = sum(v[name] for v, _ in before)
        found = sum(v.get(name, torch.zeros_like(expected)) for v, _, _ in after)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


PLAIN = distopt.DGC(density=0.05)
IN_PLACE = {
    "without decay": (PLAIN, {"weight_decay": 0.0}),
    "topk": (distopt.TopK(density=0.05), {}),
    "dense": (distopt.Dense(), {}),
}


def attached(algorithm, settings):
    torch.manual_seed(0)
    ddp = DDP(nn.Sequential(nn.Flatten(), nn.Linear(3 * 36, 8), nn.ReLU(), nn.Linear(8, 4)))
    optimizer = torch.optim.SGD(ddp.parameters(), **{"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2} | settings)
    return ddp, optimizer, algorithm.attach(ddp, optimizer)


def dcp_saved(algorithm, settings, folder):
    ddp, optimizer, attachment = attached(algorithm, settings)
    train(ddp, optimizer, 0, 4)
    dcp.save({"distopt": attachment}, checkpoint_id=folder)
    return held_back(attachment), velocities(attachment)


def dcp_loaded(algorithm, settings, folder, *, in_place):
    ddp, optimizer, attachment = attached(algorithm, settings)
    if in_place:
        dcp.load({"distopt": attachment}, checkpoint_id=folder)
    else:
        distopt.checkpoint.load_distributed(attachment, folder)
    found = held_back(attachment), velocities(attachment)
    train(ddp, optimizer, 4, 6)
    assert attachment.state_dict()["step"] == 6
    return found


@pytest.mark.parametrize("case", IN_PLACE)
@pytest.mark.parametrize(("num_ranks", "in_place"), [(2, True), (2, False), (3, False)])
def test_distributed_checkpoints_of_every_algorithm(ranks, tmp_path, case, num_ranks, in_place):
    algorithm, settings = IN_PLACE[case]
    before = ranks(2)(dcp_saved, algorithm, settings, str(tmp_path))
    after = ranks(num_ranks)(dcp_loaded, algorithm, settings, str(tmp_path), in_place=in_place)
    for name in before[0][0]:
        torch.testing.assert_close(sum(v[name] for v, _ in after), sum(v[name] for v, _ in before))
    for name in before[0][1]:
        torch.testing.assert_close(sum(u[name] for _, u in after) / num_ranks, sum(u[name] for _, u in before) / 2)


def in_place_refused(folder):
    _, _, attachment = attached(distopt.DGC(density=1.0), {})
    with pytest.raises(distopt.StateMismatchError) as raised:
        dcp.load({"distopt": attachment}, checkpoint_id=folder)
    return str(raised.value)


def test_a_load_in_place_that_would_drop_what_was_held_back_is_refused(ranks, tmp_path):
    before = ranks(2)(dcp_saved, PLAIN, {}, str(tmp_path))
    for message in ranks(2)(in_place_refused, str(tmp_path)):
        assert "must hold u and v, got none of v" in message
        assert "use distopt.checkpoint.load_distributed" in message
    after = ranks(2)(dcp_loaded, distopt.DGC(density=1.0), {}, str(tmp_path), in_place=False)
    for name in before[0][0]:
        torch.testing.assert_close(sum(v[name] for v, _ in after), sum(v[name] for v, _ in before))


def saved_while_paused(folder):
    ddp, optimizer, attachment = build(DGC)
    train(ddp, optimizer, 0, 2)
    attachment.pause()
    distopt.checkpoint.save(attachment, folder)
    dist.barrier()
    _, _, resumed = build(DGC)
    distopt.checkpoint.load(resumed, folder)
    return resumed.stats()["paused"]


def test_a_paused_run_resumes_paused(ranks, tmp_path):
    assert ranks(2)(saved_while_paused, str(tmp_path)) == [True, True]


def test_loading_the_optimizer_before_attach_is_refused_because_momentum_would_be_lost(ranks, tmp_path):
    ranks(2)(first_half, DGC, str(tmp_path))
    for message in ranks(2)(refused, DGC, str(tmp_path), without_momentum=True):
        assert "must be the saved 0.9, got 0.0; attach before optimizer.load_state_dict" in message


@pytest.fixture
def checkpoint(ranks, tmp_path):
    ranks(1)(first_half, DGC, str(tmp_path))
    return tmp_path


def test_a_flipped_byte_is_found(ranks, checkpoint):
    (path,) = checkpoint.glob("distopt-*.pt")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    (message,) = ranks(1)(refused, DGC, str(checkpoint))
    assert "must be whole" in message
    assert path.name in message
    assert "use an earlier checkpoint" in message


def refused_by_any(algorithm, folder):
    _, _, attachment = build(algorithm)
    with pytest.raises(distopt.DistoptError) as raised:
        distopt.checkpoint.load(attachment, folder)
    return f"{type(raised.value).__name__}: {raised.value}"


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_one_damaged_file_of_several_is_an_error_on_every_rank(ranks, tmp_path, num_ranks):
    ranks(2)(first_half, DGC, str(tmp_path))
    (path,) = tmp_path.glob("distopt-00001-*.pt")
    path.write_bytes(path.read_bytes()[:-1])
    messages = ranks(num_ranks)(refused_by_any, DGC, str(tmp_path))
    assert messages[1].startswith("StateMismatchError: a checkpoint file must be whole")
    for message in (messages[0], *messages[2:]):
        assert message.startswith("CompatibilityError: rank 1 cannot load: a checkpoint file must be whole")


def test_a_missing_or_truncated_file_is_found(ranks, checkpoint):
    (path,) = checkpoint.glob("distopt-*.pt")
    path.write_bytes(path.read_bytes()[:100])
    assert "another digest" in ranks(1)(refused, DGC, str(checkpoint))[0]
    path.unlink()
    assert "FileNotFoundError" in ranks(1)(refused, DGC, str(checkpoint))[0]


def test_a_damaged_manifest_and_an_empty_directory_are_found(ranks, checkpoint):
    (manifest,) = checkpoint.glob("distopt-*.json")
    text = manifest.read_text()
    manifest.write_text(text[:20])
    assert "must be whole" in ranks(1)(refused, DGC, str(checkpoint))[0]
    manifest.unlink()
    assert "must hold the file of every rank, got none" in ranks(1)(refused, DGC, str(checkpoint))[0]


def test_files_of_different_steps_are_not_mixed(ranks, tmp_path):
    ranks(2)(first_half, DGC, str(tmp_path))
    manifest = tmp_path / "distopt-00001-of-00002.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"step": 9}))
    for message in ranks(2)(refused, DGC, str(tmp_path)):
        assert "must be of one step, got steps [9, 10]" in message


def save_twice(folder):
    ddp, optimizer, attachment = build(DGC)
    distopt.checkpoint.save(attachment, folder)
    train(ddp, optimizer, 0, 2)
    distopt.checkpoint.save(attachment, folder)


def test_saving_again_replaces_the_old_file(ranks, tmp_path):
    ranks(1)(save_twice, str(tmp_path))
    assert len(list(tmp_path.glob("*.pt"))) == 1
    assert not list(tmp_path.glob("*.tmp"))
    assert ranks(1)(loaded, DGC, str(tmp_path))[0][2] == 2
