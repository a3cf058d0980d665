"""Server and sites as real processes: the simulation's result to the bit, whatever starts them, and faults."""

import contextlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import network_job
import pytest
import torch
from network_job import simulated
from test_algorithm_laws import MADE

import mpirun
from example_ranks import free_port
from mpirun import needs_mpi

pytestmark = pytest.mark.job

DEADLINE_S = 240
SECRET = "a secret of the tests, long enough"
RANK = "from network_job import main; main()"


def environment(**changed):
    folders = [str(Path(__file__).parents[2]), str(Path(__file__).parent), str(Path(__file__).parents[1])]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(folders), **changed}


class Job:
    """Ranks without an agent, which would end them all with the first one that dies."""

    def __init__(self, warm_python, out, size, *, tcp=False, secret=SECRET, without=(), **job):
        if tcp:
            job.update(tcp=free_port(), sites=size - 1)
        self.out, self.job = out, job
        self.warm_python = warm_python
        self.common = {
            "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1",
            "BOMB": str(out / "bomb"), **({"DISTOPT_JOB_SECRET": secret} if secret else {}),
        }  # fmt: skip
        self.end = time.monotonic() + DEADLINE_S
        self.ranks = [self.start(rank) for rank in range(size) if rank not in without]

    def start(self, rank, job=None, **environment):
        return self.warm_python.start(
            RANK, json.dumps(self.job if job is None else job), self.out, RANK=str(rank), LOCAL_RANK=str(rank),
            **{**self.common, **environment},
        )  # fmt: skip

    def again(self, rank, **environment):
        """The same rank once more, unhurt."""
        self.ranks[rank].wait(10)
        self.ranks[rank] = self.start(rank, {**self.job, "faults": {}}, **environment)

    def until(self, name):
        while not (self.out / name).exists():
            assert time.monotonic() < self.end, f"no {name}: {self.said()}"
            time.sleep(0.01)

    def go(self):
        (self.out / "go").touch()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for rank in self.ranks:
            rank.kill()
            rank.wait()

    def finish(self, *ranks):
        """Exit statuses of these ranks, or of all."""
        listed = ranks or range(len(self.ranks))
        try:
            return [self.ranks[rank].wait(max(0.01, self.end - time.monotonic())) for rank in listed]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not all have ended within {DEADLINE_S} s\n{self.said()}") from None

    def said(self):
        for rank in self.ranks:
            rank.kill()
        return "\n".join(f"rank {i}: {rank._written()}" for i, rank in enumerate(self.ranks))

    def found(self):
        return torch.load(self.out / "server.pt", weights_only=True)


def check_simulated(found, job):
    rows, model = simulated(job)
    assert found["rows"] == rows
    assert torch.equal(found["model"], model)


def check_of_participants(found, job):
    """What the server made is what the simulation makes of those who took part, to the bit."""
    rows, model = simulated(job, [row["participants"] for row in found["rows"]])
    assert torch.equal(found["model"], model)
    for row, expected in zip(found["rows"], rows, strict=True):
        assert row["accuracy"] == expected["accuracy"]


def described(name):
    return MADE[name].to_dict()


# -- the same result, whatever carries it ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "more"),
    [("fedau", {}), ("fedspeed", {"secret": ""}), ("scaffold", {"tcp": True, "compressed": True})],
)
def test_ranks_are_the_simulation_to_the_bit(warm_python, tmp_path, name, more):
    job = {"algorithm": described(name), "rounds": 5, "chance": 0.6}
    with Job(warm_python, tmp_path, 4, **job, **more) as ranks:
        assert ranks.finish() == [0] * 4, ranks.said()
        check_simulated(ranks.found(), {**job, **more})
        found = ranks.found()
        assert found["refused"] == {}
        took = "".join(rank._written()[0] for rank in ranks.ranks[1:])
        assert found["received"] == sum(map(int, re.findall(r"bytes_sent=(\d+)", took)))
        assert found["sent"] == sum(map(int, re.findall(r"bytes_received=(\d+)", took)))


def test_torchrun(tmp_path):
    job = {"algorithm": MADE["fedau"].to_dict(), "rounds": 5, "chance": 0.6}
    path = tmp_path / "job.py"
    path.write_text(RANK)
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", str(path),
         json.dumps(job), str(tmp_path)],
        env=environment(), timeout=100, check=True,
    )  # fmt: skip
    check_simulated(torch.load(tmp_path / "server.pt", weights_only=True), job)


@needs_mpi
def test_mpirun(tmp_path):
    job = {"algorithm": MADE["scaffold"].to_dict(), "rounds": 5, "chance": 0.6}
    ran = mpirun.start(3, Path(network_job.__file__), arguments=(json.dumps(job), tmp_path))
    said = mpirun.finish(ran)
    assert ran.returncode == 0, said
    check_simulated(torch.load(tmp_path / "server.pt", weights_only=True), job)


@needs_mpi
def test_mpi_ranks_outlive_one_that_is_killed(tmp_path):
    fault = {"what": "killed", "versions": [2], "clients": [4]}
    job = {"algorithm": MADE["fedau"].to_dict(), "rounds": 5, "faults": {"2": fault}}
    options = ["--with-ft", "ulfm", "--enable-recovery"]
    ran = mpirun.start(4, Path(network_job.__file__), *options, arguments=(json.dumps(job), tmp_path))
    said = mpirun.finish(ran)
    found = torch.load(tmp_path / "server.pt", weights_only=True)
    took = [row["participants"] for row in found["rows"]]
    assert took[3:] == [[c for c in range(9) if c not in SITE_2]] * 2, said
    check_of_participants(found, job)


def test_a_site_of_several_ranks_is_a_site_of_one_up_to_rounding(warm_python, tmp_path):
    job = {"algorithm": described("scaffold"), "rounds": 4, "chance": 0.7, "plain": True}
    job.update(server={"ranks_per_site": 2}, site={"ranks_per_site": 2})
    with Job(warm_python, tmp_path, 5, **job) as ranks:
        assert ranks.finish() == [0] * 5, ranks.said()
        rows, model = simulated(job)
        found = ranks.found()
        assert [row["participants"] for row in found["rows"]] == [row["participants"] for row in rows]
        torch.testing.assert_close(found["model"], model, rtol=1e-10, atol=1e-10)
        assert not torch.equal(found["model"], simulated({**job, "rounds": 3})[1])
        hosts = [rank._written()[0] for rank in ranks.ranks[1:]]
        assert ["hosts=(0, 2, 4, 6, 8)" in said for said in hosts] == [True, False, False, False]
        assert ["None" in said for said in hosts] == [False, True, False, True]


def test_a_site_of_several_ranks_refuses_batch_norm(warm_python, tmp_path):
    job = {"algorithm": described("fedau"), "rounds": 2, "server": {"ranks_per_site": 2}, "site": {"ranks_per_site": 2}}
    with Job(warm_python, tmp_path, 3, **job) as ranks:
        assert ranks.finish() == [1, 1, 0], ranks.said()
        said = "needs a model without BatchNorm, got '1', whose statistics would be of a share of each batch"
        assert all(said in rank._written()[1] for rank in ranks.ranks[:2])


def test_a_site_of_several_ranks_shares_the_samples_that_it_looks_at(warm_python, tmp_path):
    """DIFF2 with hardly any noise, whose last bits would decide what it is."""
    sizes = [len(part) for part in network_job.data().parts]
    settings = {"num_clients": len(sizes), "fewest_samples": min(sizes), "epsilon": 1e14, "interval": 2}
    job = {"algorithm": {"algorithm": "diff2", "clip_difference": 9.0, **settings}, "rounds": 4, "plain": True}
    job.update(server={"ranks_per_site": 2}, site={"ranks_per_site": 2})
    with Job(warm_python, tmp_path, 5, **job) as ranks:
        assert ranks.finish() == [0] * 5, ranks.said()
        rows, model = simulated(job)
        found = ranks.found()
        assert [row["epsilon"] for row in found["rows"]] == [row["epsilon"] for row in rows]
        torch.testing.assert_close(found["model"], model, rtol=0, atol=1e-5)
        assert not torch.allclose(found["model"], simulated({**job, "rounds": 3})[1], rtol=0, atol=1e-3)


# -- faults ------------------------------------------------------------------------------------------------------------

SITE_2 = [1, 4, 7]  # whom rank 2 of 4 hosts


@pytest.mark.parametrize("tcp", [True, False], ids=["tcp", "gloo"])
def test_a_site_that_is_killed_in_a_round_does_not_take_part(warm_python, tmp_path, tcp):
    fault = {"what": "killed", "versions": [2], "clients": [4]}
    job = {"algorithm": described("fedau"), "rounds": 5, "faults": {"2": fault}}
    with Job(warm_python, tmp_path, 4, tcp=tcp, **job) as ranks:
        assert ranks.finish() == [0, 0, -9, 0], ranks.said()
        found = ranks.found()
        took = [row["participants"] for row in found["rows"]]
        others = [c for c in range(9) if c not in SITE_2]
        assert took[:2] == [list(range(9))] * 2
        assert set(others) <= set(took[2]) <= {*others, 1}
        assert took[3:] == [others, others]
        check_of_participants(found, job)


@pytest.mark.parametrize("name", ["fedau", "scaffold"])
def test_a_site_that_comes_back_takes_part_again(warm_python, tmp_path, name):
    fault = {"what": "killed", "versions": [1], "clients": [7], "seconds": 0.5}
    job = {"algorithm": described(name), "rounds": 6, "faults": {"2": fault}, "journal": True, "pause_after": 3}
    with Job(warm_python, tmp_path, 4, tcp=True, sites_after_pause=3, **job) as ranks:
        ranks.until("round-3")
        ranks.again(2)
        ranks.go()
        assert ranks.finish() == [0] * 4, ranks.said()
        found = ranks.found()
        took = [row["participants"] for row in found["rows"]]
        assert not set(SITE_2) & set(took[1] + took[2])
        assert took[-1] == list(range(9))
        check_of_participants(found, job)  # SCAFFOLD's too: the site's file has what its clients kept


def test_a_site_that_never_answers_is_not_waited_for_beyond_the_deadline(warm_python, tmp_path):
    fault = {"what": "frozen", "versions": [1], "clients": [1]}
    job = {"algorithm": described("fedau"), "rounds": 5, "faults": {"2": fault}, "server": {"deadline_s": 1.0}}
    with Job(warm_python, tmp_path, 4, tcp=True, **job) as ranks:
        assert ranks.finish(0, 1, 3) == [0] * 3, ranks.said()
        found = ranks.found()
        assert [row["participants"] for row in found["rows"]][1:] == [[0, 2, 3, 5, 6, 8]] * 4
        check_of_participants(found, job)


@pytest.mark.parametrize("transport", ["tcp", "gloo"])
def test_a_site_that_is_late_is_refused_and_takes_part_later(warm_python, tmp_path, transport):
    fault = {"what": "slow", "versions": [1], "clients": [1], "seconds": 2.5}
    job = {"algorithm": described("fedau"), "rounds": 12, "faults": {"2": fault}, "server": {"deadline_s": 1.0}}
    job["faults"]["1"] = {"what": "slow", "versions": list(range(2, 12)), "clients": [0], "seconds": 0.3}
    with Job(warm_python, tmp_path, 4, tcp=transport == "tcp", **job) as ranks:
        assert ranks.finish() == [0] * 4, ranks.said()
        found = ranks.found()
        assert found["refused"].keys() == {"late"}
        took = [row["participants"] for row in found["rows"]]
        assert 1 not in took[1]
        assert took[-1] == list(range(9))
        check_of_participants(found, job)


def test_replies_with_nan_are_refused(warm_python, tmp_path):
    fault = {"what": "nan", "versions": [1, 2], "clients": [1, 7]}
    job = {"algorithm": described("fedau"), "rounds": 4, "faults": {"2": fault}, "compressed": True}
    with Job(warm_python, tmp_path, 4, tcp=True, **job) as ranks:
        assert ranks.finish() == [0] * 4, ranks.said()
        found = ranks.found()
        assert [row["refused"] for row in found["rows"]] == [0, 2, 2, 0]
        assert found["refused"] == {"not finite": 4}


LIES = ["stranger", "other", "future", "garbage", "replay", "pickle", "sender", "session"]


def test_what_is_no_reply_of_this_site_and_round_is_refused_and_changes_nothing(warm_python, tmp_path):
    job = {"algorithm": described("scaffold"), "rounds": 4, "lies": {"2": LIES}}
    with Job(warm_python, tmp_path, 4, tcp=True, **job) as ranks:
        assert ranks.finish() == [0] * 4, ranks.said()
        found = ranks.found()
        assert torch.equal(found["model"], simulated(job)[1])
        assert not (tmp_path / "bomb").exists()
        counted = found["refused"]
        assert counted["not its client"] == 4 * 3 * 2
        assert counted["no letter"] == 4 * 3 * 3
        assert counted["another session"] == 4 * 3
        assert counted["another version"] == 4 * 3
        assert counted["duplicate"] + counted.get("late", 0) == 4 * 3 - 1
        assert sum(row["refused"] for row in found["rows"]) <= sum(counted.values())


def test_a_reply_of_another_shape_is_refused(warm_python, tmp_path):
    job = {"algorithm": described("fedau"), "rounds": 2, "lies": {"2": ["shape"]}}
    with Job(warm_python, tmp_path, 4, tcp=True, **job) as ranks:
        assert ranks.finish() == [0] * 4, ranks.said()
        found = ranks.found()
        assert found["refused"] == {"shape": 6}
        simulated_without = simulated(job, [[0, 2, 3, 5, 6, 8]] * 2)[1]
        assert torch.equal(found["model"], simulated_without)


def test_garbage_and_huge_announcements_at_the_port_change_nothing(warm_python, tmp_path):
    job = {"algorithm": described("fedau"), "rounds": 4, "pause_after": 2}
    with Job(warm_python, tmp_path, 3, tcp=True, **job) as ranks:
        ranks.until("round-2")
        for sent in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(5000), struct.pack("<4sQ", b"DOPT", 2**31) * 20):
            with socket.create_connection(("127.0.0.1", int(ranks.job["tcp"])), 5) as stream:
                stream.sendall(sent)
                with contextlib.suppress(OSError):
                    stream.recv(1000)
        ranks.go()
        assert ranks.finish() == [0] * 3, ranks.said()
        check_simulated(ranks.found(), job)
        assert sum(ranks.found()["refused"].values()) >= 3


def test_who_lacks_the_secret_is_refused_and_counted(warm_python, tmp_path):
    job = {"algorithm": described("fedau"), "rounds": 2, "server": {"fewest_sites": 1}, "pause_after": 1}
    job["site"] = {"wait_s": 3.0}
    with Job(warm_python, tmp_path, 3, tcp=True, without=[2], **job) as ranks:
        ranks.ranks.append(ranks.start(2, DISTOPT_JOB_SECRET="another secret, long enough too"))
        assert ranks.finish(2) == [1]
        assert "another job secret" in ranks.ranks[2]._written()[1]
        ranks.go()
        assert ranks.finish(0, 1) == [0, 0], ranks.said()
        assert sum(ranks.found()["refused"].values()) >= 1
        assert [row["participants"] for row in ranks.found()["rows"]] == [[0, 2, 4, 6, 8]] * 2


def test_over_gloo_too_nobody_is_heard_without_the_secret(warm_python, tmp_path):
    job = {"algorithm": described("fedau"), "rounds": 2, "server": {"fewest_sites": 1, "wait_s": 20.0}}
    job["site"] = {"wait_s": 4.0}
    with Job(warm_python, tmp_path, 3, without=[2], **job) as ranks:
        ranks.ranks.append(ranks.start(2, DISTOPT_JOB_SECRET="another secret, long enough too"))
        assert ranks.finish() == [0, 0, 1], ranks.said()
        assert "has said nothing for 4 s" in ranks.ranks[2]._written()[1]
        assert ranks.found()["refused"].keys() == {"unauthenticated"}


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("scaffold", {"compressed": True}),
        ("fedau", {"chance": 0.5}),
        ("fedspeed", {"chance": 0.5}),
    ],
)
def test_a_server_that_is_killed_and_started_again_makes_the_same_history(warm_python, tmp_path, name, more):
    job = {"algorithm": described(name), "rounds": 8, "checkpoint": 2, "kill_server_after": 5, **more}
    with Job(warm_python, tmp_path, 4, tcp=True, **job) as ranks:
        assert ranks.finish(0) == [-9], ranks.said()
        ranks.again(0)
        assert ranks.finish() == [0] * 4, ranks.said()
        check_simulated(ranks.found(), job)


def test_a_whole_job_that_is_started_again_goes_on_from_its_files(warm_python, tmp_path):
    """As under torchrun, which ends all ranks: sites find what their clients kept in files of their own."""
    job = {"algorithm": described("scaffold"), "rounds": 8, "checkpoint": 2, "kill_server_after": 5, "journal": True}
    with Job(warm_python, tmp_path, 3, **job) as ranks:
        assert ranks.finish() == [-9, 1, 1], ranks.said()
        assert "the server, rank 0, is gone" in ranks.ranks[1]._written()[1]
    with Job(warm_python, tmp_path, 3, **job) as ranks:
        assert ranks.finish() == [0] * 3, ranks.said()
        check_simulated(ranks.found(), job)


def test_so_does_one_whose_sites_are_several_ranks(warm_python, tmp_path):
    """The leader's file has what its clients kept; the other rank of the site has nothing and is told."""
    job = {"algorithm": described("scaffold"), "rounds": 8, "checkpoint": 2, "kill_server_after": 5, "journal": True}
    job.update(plain=True, server={"ranks_per_site": 2}, site={"ranks_per_site": 2})
    with Job(warm_python, tmp_path, 3, **job) as ranks:
        assert ranks.finish() == [-9, 1, 0], ranks.said()
    with Job(warm_python, tmp_path, 3, **job) as ranks:
        assert ranks.finish() == [0] * 3, ranks.said()
        torch.testing.assert_close(ranks.found()["model"], simulated(job)[1], rtol=1e-10, atol=1e-10)


def test_a_job_that_does_not_wait_goes_on_after_its_server_s_death(warm_python, tmp_path):
    algorithm = {"algorithm": "fedbuff", "buffer_size": 3}
    job = {"algorithm": algorithm, "rounds": 30, "checkpoint": 2, "kill_server_after": 11}
    with Job(warm_python, tmp_path, 3, tcp=True, **job) as ranks:
        assert ranks.finish(0) == [-9], ranks.said()
        ranks.again(0)
        assert ranks.finish() == [0] * 3, ranks.said()
        rows = ranks.found()["rows"]
        assert [row["round"] for row in rows] == list(range(1, 31))
        assert all(len(row["participants"]) == 3 for row in rows)
        assert [row["time_s"] for row in rows] == sorted(row["time_s"] for row in rows)


@pytest.mark.parametrize(
    "algorithm",
    [{"algorithm": "fedfix", "interval_s": 0.3}, {"algorithm": "fedbuff", "buffer_size": 3, "concurrency": 6}],
    ids=["fedfix", "fedbuff"],
)
@pytest.mark.parametrize("what", ["killed", "frozen"])
def test_who_does_not_wait_goes_on_without_a_site(warm_python, tmp_path, algorithm, what):
    fault = {"what": what, "versions": list(range(2, 40)), "clients": [4]}
    job = {"algorithm": algorithm, "rounds": 40, "faults": {"2": fault}, "server": {"deadline_s": 2.0}}
    with Job(warm_python, tmp_path, 4, tcp=True, **job) as ranks:
        assert ranks.finish(0, 1, 3) == [0] * 3, ranks.said()
        took = [row["participants"] for row in ranks.found()["rows"]]
        assert len(took) == 40
        others = {c for c in range(9) if c not in SITE_2}
        assert set().union(*took[-10:]) == others
        assert not set(SITE_2) & set().union(*took[-10:])
        if algorithm["algorithm"] == "fedbuff":
            assert {len(each) for each in took} == {3}


def test_a_site_that_fails_says_why_and_the_others_go_on(warm_python, tmp_path):
    fault = {"what": "fails", "versions": [1], "clients": [1]}
    job = {"algorithm": described("fedau"), "rounds": 3, "faults": {"2": fault}}
    with Job(warm_python, tmp_path, 4, tcp=True, **job) as ranks:
        assert ranks.finish() == [0, 0, 1, 0], ranks.said()
        found = ranks.found()
        assert [row["participants"] for row in found["rows"]][1:] == [[0, 2, 3, 5, 6, 8]] * 2
        assert "rank 2 does not take part any more: ZeroDivisionError: of this site" in ranks.ranks[0]._written()[1]
        check_of_participants(found, job)
