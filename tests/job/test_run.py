"""A job at work: it goes on from its checkpoints to the same bits, whatever the family, and says what is wrong."""

import json
import os
import shutil

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distopt
from distopt.errors import CompatibilityError, ConfigError, DistoptError, StateMismatchError
from distopt.job.checkpoint_folder import CheckpointFolder, Mark
from distopt.job.keeping import keeper_for

DGC = {"algorithm": "dgc", "density": 0.1, "exchange": "allgather"}
GOSSIP = {"algorithm": "gossip", "topology": "ring", "correction": "off"}
LOCAL = {"algorithm": "sparseloco", "inner_steps": 3, "overlap": 1, "chunk": 16, "k": 4}  # under way at step 4


class Job:
    """A training of 12 steps; the learning rate changes with each."""

    def __init__(self, algorithm, folder, *, every=4, keep=2, model=None):
        self.table = {
            **algorithm,
            "checkpoint": {"folder": str(folder / "checkpoints"), "every": every, "keep": keep},
            "log": {"folder": str(folder / "log"), "every": 1},
        }
        torch.manual_seed(0)
        self.model = model or nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        if algorithm["algorithm"] == "dgc":
            self.model = DistributedDataParallel(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.LinearLR(self.optimizer, total_iters=12)

    def attach(self):
        return distopt.Job.load(self.table).attach(self.model, self.optimizer, scheduler=self.scheduler)

    def step(self, step):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(100 * step + dist.get_rank()))
        self.optimizer.zero_grad()
        self.model(x).square().mean().backward()
        self.optimizer.step()
        self.scheduler.step()

    def bits(self):
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()])


def on_ranks(algorithm, folder, stop_at=None, num_steps=12, **options):
    """The steps that were made, the parameters then, and what it went on from."""
    job, made = Job(algorithm, folder, **options), []
    with job.attach() as run:
        for step in run.steps(num_steps):
            if step == stop_at:
                break
            job.step(step)
            made.append(step)
        return made, job.bits(), run.resumed


def names(folder):
    return sorted(each.name for each in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize("algorithm", [DGC, GOSSIP, LOCAL], ids=["dgc", "gossip", "local"])
def test_a_run_that_stops_goes_on_to_the_same_bits(ranks, tmp_path, algorithm):
    whole = ranks(2)(on_ranks, algorithm, tmp_path / "whole")
    assert names(tmp_path / "whole") == ["step-12", "step-8"]
    for made, _, resumed in ranks(2)(on_ranks, algorithm, tmp_path / "cut", stop_at=11):
        assert (made, resumed) == (list(range(11)), None)
    resumed = ranks(2)(on_ranks, algorithm, tmp_path / "cut")
    for (_, expected, _), (made, bits, since) in zip(whole, resumed, strict=True):
        assert (made, since) == ([8, 9, 10, 11], "step-8")
        assert torch.equal(bits, expected)
    lines = [json.loads(line) for line in (tmp_path / "cut/log/stats-1.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    for made, bits, since in ranks(2)(on_ranks, algorithm, tmp_path / "cut"):
        assert (made, since) == ([], "step-12")
        assert bits.isfinite().all()


def test_another_number_of_ranks_goes_on_with_replicas_and_not_under_gossip(ranks, tmp_path):
    ranks(2)(on_ranks, DGC, tmp_path / "dgc")
    for made, _, since in ranks(3)(on_ranks, DGC, tmp_path / "dgc", num_steps=14):
        assert (made, since) == ([12, 13], "step-12")
    ranks(2)(on_ranks, GOSSIP, tmp_path / "gossip")
    said = ranks(3)(on_refusal, GOSSIP, tmp_path / "gossip")
    assert {kind for kind, _ in said} == {"StateMismatchError"}
    assert "step-12 of 2 ranks needs as many, got 3; start 2, or name another folder" in said[0][1]


def on_refusal(algorithm, folder, wrong=None, **options):
    """The error at attach and its text, on each rank."""
    if wrong is not None and dist.get_rank() == wrong:
        folder = folder / "elsewhere"
    try:
        on_ranks(algorithm, folder, **options)
    except DistoptError as error:
        return type(error).__name__, str(error)
    return None


def on_another_model(folder):
    return on_refusal(DGC, folder, model=nn.Linear(6, 4))


def test_a_checkpoint_of_another_model_or_damaged_is_refused_on_every_rank(ranks, tmp_path):
    ranks(2)(on_ranks, DGC, tmp_path)
    for _, text in ranks(2)(on_another_model, tmp_path):
        assert "the model of the checkpoint does not fit this one" in text
    (path,) = (tmp_path / "checkpoints/step-12").glob("shared-*.pt")
    path.unlink()
    for _, text in ranks(2)(on_refusal, DGC, tmp_path):
        assert "a checkpoint must have one file shared-*.pt, got 0" in text
    shutil.rmtree(tmp_path / "checkpoints/step-12")
    for made, _, since in ranks(2)(on_ranks, DGC, tmp_path):
        assert (made, since) == ([8, 9, 10, 11], "step-8")


def on_folders_of_their_own(folder):
    import distopt.job.keeping

    distopt.job.keeping._APPEARS_S = 0.1
    return on_refusal(DGC, folder, wrong=1)


def test_a_folder_that_is_not_shared_is_noticed_before_the_first_step(ranks, tmp_path):
    first, second = ranks(2)(on_folders_of_their_own, tmp_path)
    assert second[0] == "ConfigError"
    assert "must be one that all ranks share" in second[1]
    assert "rank 1 cannot keep checkpoints: folder of checkpoint must be one that all ranks share" in first[1]
    assert names(tmp_path) == []


def on_a_full_disk(folder, error):
    from distopt.job import checkpoint_folder

    def full(*_):
        raise error

    saved = checkpoint_folder.torch.save
    checkpoint_folder.torch.save = full if dist.get_rank() == 0 else saved
    try:
        return on_refusal(DGC, folder)
    finally:
        checkpoint_folder.torch.save = saved


FULL = (
    OSError(28, "No space left on device"),
    RuntimeError("PytorchStreamWriter failed writing file"),
    AttributeError("Can't pickle local object"),
)


@pytest.mark.parametrize("error", FULL, ids=["system", "torch", "pickle"])
def test_a_rank_that_cannot_write_ends_all_and_nothing_counts(ranks, tmp_path, error):
    first, second = ranks(2)(on_a_full_disk, tmp_path, error)
    assert "step-4 cannot be written to" in first[1]
    assert (error.strerror if isinstance(error, OSError) else str(error)) in first[1]
    assert "rank 0 cannot save: step-4 cannot be written" in second[1]
    assert names(tmp_path) == ["step-4.unfinished"]
    for made, _, since in ranks(2)(on_ranks, DGC, tmp_path):
        assert (made[0], since) == (0, None)


def on_epochs(folder, num_epochs, unit="epochs"):
    job, made = Job(DGC, folder, every=5, keep=9), []
    with job.attach() as run:
        for epoch in getattr(run, unit)(num_epochs):
            for step in range(3):
                job.step(3 * epoch + step)
            made.append(epoch)
    return made


def test_a_second_loop_goes_on_where_the_first_one_ended(tmp_path):
    for kept in ({}, {"checkpoint": {"folder": str(tmp_path / "checkpoints"), "every": 2}}):
        with attached({"algorithm": "gossip", **kept}) as run:
            for step in run.steps(9):
                if step == 3:  # is not done
                    break
            assert list(run.steps(5)) == [3, 4]
            assert list(run.steps(5)) == []


def test_epochs_are_saved_once_so_many_steps_are_made(ranks, tmp_path):
    assert ranks(2)(on_epochs, tmp_path, 5) == [[0, 1, 2, 3, 4]] * 2
    assert names(tmp_path) == ["epoch-2", "epoch-4", "epoch-5"]  # of 3 steps each, the last one in any case
    assert ranks(2)(on_epochs, tmp_path, 6) == [[5]] * 2
    with pytest.raises(AssertionError, match="the loop must count what the checkpoint counts, got steps and epoch-6"):
        ranks(2)(on_epochs, tmp_path, 20, "steps")


def on_coding(folder, num_steps):
    data = torch.randn(24, 6, generator=torch.Generator().manual_seed(1)).double()
    torch.manual_seed(0)
    model = nn.Linear(6, 2).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    table = {"algorithm": "gradient-coding", "checkpoint": {"folder": str(folder / "checkpoints"), "every": 2}}
    batches = distopt.coding.Batches(len(data), 12)
    with distopt.Job.load(table).attach(model, optimizer, batches=batches) as run:
        for _ in run.steps(num_steps):
            run.attachment.backward(lambda part: model(data[part.samples]).square().sum())
            optimizer.step()
        return run.resumed, torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def test_coded_training_goes_on_to_the_same_bits(ranks, tmp_path):
    whole = ranks(3)(on_coding, tmp_path / "whole", 7)
    ranks(3)(on_coding, tmp_path / "cut", 5)
    assert names(tmp_path / "cut") == ["step-4", "step-5"]
    shutil.rmtree(tmp_path / "cut/checkpoints/step-5")
    resumed = ranks(3)(on_coding, tmp_path / "cut", 7)
    assert [since for since, _ in resumed] == ["step-4"] * 3
    assert torch.allclose(resumed[0][1], whole[0][1], rtol=1e-12)
    assert torch.equal(resumed[1][1], resumed[0][1])


class Leaving:
    """A rank of three under gossip, of which one goes at the given call of `consensus_distance`."""

    family, step, process_group = "gossip", 7, None
    algorithm = distopt.Gossip()

    def __init__(self, at):
        self.place, self.calls, self._at = (0, 3), 0, at

    def consensus_distance(self):
        self.calls += 1
        if self.calls == self._at:
            self.place = (0, 2)
            raise distopt.PeerLostError("gone", (2,))
        return 0.0

    def state_dict(self):
        return {"step": 7}


def others_write(folder, rank, but=()):
    """The first to say that all are here have seen them write."""
    original = rank.consensus_distance

    def consensus_distance():
        for place in set(range(1, rank.place[1])) - set(but):
            begun, name = folder.begin(Mark("step", 7)), f"{place:05d}-of-{rank.place[1]:05d}"
            (begun / f"rank-{name}-0.pt").touch()
            (begun / f"distopt-{name}.json").touch()
        return original()

    return consensus_distance


def test_a_checkpoint_without_the_files_of_a_rank_does_not_count(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("distopt.job.keeping._APPEARS_S", 0.1)
    rank, folder = Leaving(9), CheckpointFolder(tmp_path / "checkpoints", keep=2)
    rank.consensus_distance = others_write(folder, rank, but=[2])
    with caplog.at_level("WARNING", "distopt"):
        keeper_for(folder, rank, {"model": nn.Linear(1, 1)}).save(Mark("step", 7))
    assert folder.newest() is None
    assert "step-7 is left out: not every rank has written its files" in caplog.text


@pytest.mark.parametrize(("at", "kept"), [(9, ["step-7"]), (1, ["step-7"]), (2, ["step-7.unfinished"])])
def test_a_checkpoint_during_which_a_rank_goes_does_not_count(tmp_path, caplog, monkeypatch, at, kept):
    leaving = Leaving(at)
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    keeper = keeper_for(folder, leaving, {"model": nn.Linear(1, 1)})
    monkeypatch.setattr("distopt.job.keeping._APPEARS_S", 0.1)
    monkeypatch.setattr(leaving, "consensus_distance", others_write(folder, leaving))
    with caplog.at_level("WARNING", "distopt"):
        keeper.save(Mark("step", 7))
    assert names(tmp_path) == kept
    assert leaving.calls == (2 if at == 9 else 3)  # whoever is left is asked again
    assert ("step-7 is left out" in caplog.text) == (at == 2)


def attached(table, **options):
    model = nn.Linear(2, 2)
    return distopt.Job.load(table).attach(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)


@pytest.mark.parametrize(
    ("table", "options", "kind", "said"),
    [
        ({"algorithm": "fedavg"}, {}, CompatibilityError, "run it with distopt simulate"),
        ({"algorithm": "dgc"}, {"batches": 3}, ConfigError, "dgc takes scaler, process_group at attach, got batches"),
        ({"algorithm": "gossip"}, {"parts": {"model": nn.Linear(1, 1)}}, ConfigError, "names of their own, got Linear"),
        (
            {"algorithm": "gossip", "checkpoint": {}},
            {"join": "a:1"},
            CompatibilityError,
            "cannot resume, got join='a:1'",
        ),
    ],
)
def test_what_cannot_be_attached(table, options, kind, said):
    with pytest.raises(kind, match=said):
        attached(table, **options)


def test_a_process_alone_keeps_checkpoints_too_and_gives_all_back_where_that_fails(tmp_path):
    table = {"algorithm": "gossip", "checkpoint": {"folder": str(tmp_path / "checkpoints"), "every": 1}}
    with attached(table) as run:
        assert list(run.steps(3)) == [0, 1, 2]
    assert names(tmp_path) == ["step-2", "step-3"]
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # the second time the model would be attached already
        with pytest.raises(StateMismatchError, match="must hold the parts of this run, model, optimizer, averaged"):
            distopt.Job.load(table).attach(model, optimizer, parts={"averaged": nn.Linear(2, 2)})
    with pytest.raises(CompatibilityError, match="must have state_dict and load_state_dict, got int as averaged"):
        attached(table, parts={"averaged": 3})
    assert not [name for name in os.listdir(tmp_path / "checkpoints") if name.startswith(".")]
