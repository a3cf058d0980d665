"""What is written about a run: whole lines, each step once, all numbers, and nothing lost at the end."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distopt
from distopt.job import LogSettings
from distopt.observe import read_folder, read_lines, record
from tensorboard_events import scalars


class Attached:
    """Counts the steps of an optimizer."""

    family, rank = "ddp", 0

    def __init__(self, step=0):
        self.step = step
        self.read = 0
        self.odd = 0.5

    def stats(self):
        self.read += 1
        return {
            "steps": self.step, "flag": True, "nothing": None, "text": "odd" if self.step % 2 else "even",
            "odd": self.odd, "deep": {"list": [1, {"inside": 2.5}], "empty": []},
        }  # fmt: skip


def train(attached, optimizer, steps):
    for _ in range(steps):
        attached.step += 1
        optimizer.step()


def make_optimizer():
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)


def settings(folder, **others):
    return LogSettings(folder=str(folder), **{"every": 3, "report": False, **others})


def steps_of(folder, rank=0):
    return [line["step"] for line in read_folder(folder)[rank]]


def test_a_line_after_the_first_step_each_so_many_and_the_last(tmp_path):
    attached, optimizer = Attached(), make_optimizer()
    with record(attached, optimizer, settings(tmp_path)):
        train(attached, optimizer, 8)
        assert attached.read == 3  # the others cost no more than a look at the step
    assert steps_of(tmp_path) == [1, 3, 6, 8]
    train(attached, optimizer, 4)  # nobody listens any more
    assert steps_of(tmp_path) == [1, 3, 6, 8]
    first, *_, last = read_lines(tmp_path / "stats-0.jsonl")
    assert first["seconds_per_step"] is None
    assert last["seconds_per_step"] > 0
    assert last["seconds"] >= 2 * last["seconds_per_step"]
    assert last["stats"]["deep"] == {"list": [1, {"inside": 2.5}], "empty": []}


def test_steps_that_the_optimizer_skips_count(tmp_path):
    attached, optimizer = Attached(), make_optimizer()
    with record(attached, optimizer, settings(tmp_path)):
        train(attached, optimizer, 2)
        attached.step = 4  # two steps that no hook saw
        train(attached, optimizer, 2)
    assert steps_of(tmp_path) == [1, 5, 6]


@pytest.mark.parametrize("ending", ["", '{"step": 9, "sta', '{"step": 9}'])
def test_a_resumed_run_has_each_step_once(tmp_path, ending, caplog):
    attached, optimizer = Attached(), make_optimizer()
    with record(attached, optimizer, settings(tmp_path)):
        train(attached, optimizer, 8)
    with (tmp_path / "stats-0.jsonl").open("a") as file:
        file.write(ending)  # half a line of a run that was killed
    attached, optimizer = Attached(step=4), make_optimizer()
    with record(attached, optimizer, settings(tmp_path)):
        train(attached, optimizer, 6)
    assert steps_of(tmp_path) == [1, 3, 5, 6, 9, 10]
    assert "2 lines of steps from 5 on are removed" in caplog.text
    assert [line["first_step"] for line in read_lines(tmp_path / "stats-0.jsonl")] == [1, 1, 5, 5, 5, 5]


def test_what_is_not_finite_is_valid_json(tmp_path):
    attached, optimizer = Attached(), make_optimizer()
    with record(attached, optimizer, settings(tmp_path, every=1)) as recorder:
        for attached.odd in (math.nan, math.inf, -math.inf):
            recorder.note(loss=attached.odd)
            train(attached, optimizer, 1)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    texts = (tmp_path / "stats-0.jsonl").read_text().splitlines()
    read = [json.loads(text, parse_constant=refuse) for text in texts]
    assert [line["stats"]["odd"] for line in read] == ["nan", "inf", "-inf"]
    assert [line["values"]["loss"] for line in read] == ["nan", "inf", "-inf"]


def test_every_number_is_an_event_and_a_text_only_when_it_changes(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    attached, optimizer = Attached(), make_optimizer()
    with record(attached, optimizer, settings(tmp_path, every=2, tensorboard=True)) as recorder:
        recorder.note(loss=2.0)
        train(attached, optimizer, 5)
    found = scalars(tmp_path / "rank-0")
    names = {"steps", "flag", "odd", "deep/list/0", "deep/list/1/inside", "loss"}
    assert set(found) == names | {"seconds_per_step"}
    for name in names:
        assert [event.step for event in found[name]] == [1, 2, 4, 5]
    assert [event.value for event in found["deep/list/1/inside"]] == [2.5] * 4
    read = EventAccumulator(str(tmp_path / "rank-0"))
    read.Reload()
    (tag,) = read.Tags()["tensors"]
    assert [event.step for event in read.Tensors(tag)] == [1, 2, 5]  # at 4 it is as it was at 2


@pytest.mark.parametrize("kept", [False, True])
def test_a_run_that_is_never_closed_loses_nothing(tmp_path, warm_python, kept):
    code = (
        "import sys, threading\n"
        "from test_recorder import *\n"
        "def main():\n"
        "    attached, optimizer = Attached(), make_optimizer()\n"
        "    record(attached, optimizer, settings(sys.argv[1]))\n"
        "    if sys.argv[3] == 'True':\n"  # a thread that never ends keeps all of it alive
        "        threading.Thread(target=lambda: threading.Event().wait() or optimizer, daemon=True).start()\n"
        "    train(attached, optimizer, 8)\n"
        "    sys.exit(sys.argv[2])\n"
        "main()\n"
    )
    ended = warm_python.start(code, tmp_path, "it has failed", kept)
    assert ended.wait() == 1
    assert ended.communicate()[1].strip() == "it has failed"
    assert steps_of(tmp_path) == [1, 3, 6, 8]


def test_a_full_disk_ends_the_log_and_not_the_training(tmp_path, monkeypatch, caplog):
    attached, optimizer = Attached(), make_optimizer()
    with record(attached, optimizer, settings(tmp_path, every=1)):
        train(attached, optimizer, 2)

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.write", full)
        train(attached, optimizer, 3)
    assert attached.step == 5
    assert steps_of(tmp_path) == [1, 2]
    assert caplog.text.count("No space left on device") == 1


def test_refusals(tmp_path):
    with pytest.raises(distopt.CompatibilityError, match=r"got Linear; pass the torch optimizer inside it"):
        record(Attached(), nn.Linear(1, 1), settings(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(distopt.ConfigError, match=r"folder of log must be one that can be written, got '.*file'"):
        record(Attached(), None, settings(tmp_path / "file"))
    with pytest.raises(distopt.ConfigError, match=r"must hold stats-0.jsonl, got no line there"):
        read_folder(tmp_path)
    (tmp_path / "stats-0.jsonl").write_text("{}\n")
    with pytest.raises(
        distopt.ConfigError, match=r"line 1, must be an object with a step, got '\{\}'; remove the line"
    ):
        read_folder(tmp_path)
    with pytest.raises(distopt.ConfigError, match="line 1, must be an object with a step"):
        record(Attached(), None, settings(tmp_path))  # now, not behind the first step


def recorded(algorithm, folder, *, start=None, steps=7):
    """A training of DDP with a log; what its attachment said last, and its state."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(40, 20))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    attachment = algorithm.attach(model, optimizer)
    recorder = record(attachment, optimizer, LogSettings(folder=folder, every=3))
    if start is not None:
        attachment.load_state_dict(start)
    for _ in range(steps):
        model(torch.randn(4, 40)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    attachment.detach()
    return attachment.stats(), attachment.state_dict(), recorder.close()


def test_ranks_of_ddp(tmp_path, ranks):
    algorithm = distopt.DGC(density=0.01)
    told = ranks(2)(recorded, algorithm, str(tmp_path))
    found = read_folder(tmp_path)
    for rank, (stats, _, _) in enumerate(told):
        assert [line["step"] for line in found[rank]] == [1, 3, 6, 7]
        assert found[rank][-1]["stats"] == json.loads(json.dumps(stats))
        assert found[rank][-1]["family"] == "ddp"
    report = (tmp_path / "report.txt").read_text()
    assert report == told[0][2] + "\n"
    assert "dgc on 2 ranks" in report
    assert ": 7 steps, " in report
    sent, dense = (7 * told[0][0]["last"][name] for name in ("bytes_sent", "bytes_dense"))
    assert (
        f"Sent: {sent / 1e3:,.1f} kB, {dense / sent:.1f} times less than dense fp32 ({dense / 1e3:,.1f} kB)" in report
    )
    for rank, (_, state, _) in enumerate(told):
        assert state["step"] == 7, rank


def gossiped(folder):
    torch.manual_seed(0)
    model = nn.Linear(40, 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with distopt.Gossip(topology="complete").attach(model, optimizer) as attached:
        recorder = record(attached, optimizer, LogSettings(folder=folder, every=3))
        for _ in range(7):
            model(torch.randn(4, 40)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return attached.stats(), recorder.close()


def test_ranks_of_gossip(tmp_path, ranks):
    told = ranks(2)(gossiped, str(tmp_path))
    found = read_folder(tmp_path)
    for rank, (stats, text) in enumerate(told):
        assert [line["step"] for line in found[rank]] == [1, 3, 6, 7]
        assert found[rank][-1]["stats"] == json.loads(json.dumps(stats))
        assert "d-psgd on complete with 2 ranks: 7 steps" in text
        assert "7 exchanges; 0 steps passed" in text


def of_local_steps(folder):
    torch.manual_seed(0)
    model = nn.Linear(40, 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with distopt.SparseLoCo(inner_steps=3, overlap=1).attach(model, optimizer) as attached:
        recorder = record(attached, optimizer, LogSettings(folder=folder, every=3))
        for _ in range(7):
            model(torch.randn(4, 40)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        attached.flush()
    return attached.stats(), recorder.close()


def test_ranks_of_local_steps(tmp_path, ranks):
    told = ranks(2)(of_local_steps, str(tmp_path))
    found = read_folder(tmp_path)
    for rank, (stats, text) in enumerate(told):
        assert [line["step"] for line in found[rank]] == [1, 3, 6, 7]
        assert found[rank][-1]["stats"] == json.loads(json.dumps(stats))
        assert "sparseloco with 2 ranks, outer_lr 1: 7 steps" in text
        assert "2 exchanges, 2 rounds complete" in text
        assert f"Sent {stats['bytes_sent']} bytes, " in text


def coded(folder, start):
    torch.manual_seed(0)
    model = nn.Linear(40, 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with distopt.GradientCoding(stragglers=1).attach(model, optimizer) as coding:
        coding.load_state_dict({"format": 1, "algorithm": coding.algorithm.name, "step": start, "round": start})
        recorder = record(coding, optimizer, LogSettings(folder=folder, every=3))
        for _ in coding.steps(7):
            coding.backward(lambda part: (model(torch.ones(4, 40)).square().sum(), 4))
            optimizer.step()
        report = recorder.close()
    return coding.stats(), report, coding.step


def test_ranks_of_coding(tmp_path, ranks):
    told = ranks(3)(coded, str(tmp_path), 10)
    found = read_folder(tmp_path)
    assert [line["step"] for line in found[0]] == [11, 12, 15, 17]
    assert "fractional" in told[0][1]
    assert "7 gradients in 7 rounds" in told[0][1]
    for rank in (1, 2):  # a worker may skip rounds, and ends with the last that it computed
        steps = [line["step"] for line in found[rank]]
        assert steps == sorted(set(steps))
        assert 11 <= steps[0] <= steps[-1] <= told[rank][2] == 17
        assert "a worker" in told[rank][1]
