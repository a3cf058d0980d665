"""Ranks of local steps that are killed, stopped, late or leave, in jobs of real processes that no agent holds together.

In all of them: theta is the same bits on all ranks after every exchange, and with all sent it is the mean of the models
of those that took part.
"""

import itertools
import signal

import numpy as np
import pytest

import rank_job
from distopt.local import DiLoCo, SparseLoCo

pytestmark = [pytest.mark.job, pytest.mark.timeout(300)]

FULL = {"chunk": 64, "k": 64, "decay": 1.0, "values": "fp32"}  # all is sent: theta is the mean
TIMES = {"peer_timeout": 60.0, "grace": 1.0}
MEANS = {
    "sparse": SparseLoCo(inner_steps=4, **FULL, **TIMES),
    "dense": DiLoCo(inner_steps=4, outer_lr=1.0, outer_momentum=0.0, nesterov=False, **TIMES),
}
OTHERS = {
    "momentum": DiLoCo(inner_steps=5, overlap=3, fragments=2, **TIMES),
    "streamed": SparseLoCo(inner_steps=6, overlap=3, fragments=3, chunk=8, k=2, outer_momentum=0.3, **TIMES),
}
ALL = {**MEANS, **OTHERS}


class LocalJob(rank_job.Job):
    module = "local_fault_rank"


@pytest.fixture
def job(warm_python, tmp_path):
    def start(size, algorithms, **options):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return LocalJob(warm_python, folder, size, algorithms, lr=0.05, **options)

    return start


def check_exchanges(job, ranks, names):
    """What holds of every exchange; returns who took part in each, by the number of exchanges after it."""
    taken_part = {}
    for name in names:
        by_number = {}
        for rank in ranks:
            told = job.events(rank, "exchange", name)
            for each, following in itertools.zip_longest(told, told[1:]):
                # Who is cut off may make an exchange of what had arrived, and the others make it anew without it.
                if following is None or not following["restarted"]:
                    by_number.setdefault(each["done"], {})[rank] = each
        for number, told in by_number.items():
            assert len({each["theta"] for each in told.values()}) == 1, (name, number)
            senders = next((each["senders"] for each in told.values() if each["senders"]), [])
            assert all(each["senders"] in ([], senders) for each in told.values()), (name, number)
            owns = {job_number(job, rank): each["own"] for rank, each in told.items() if not each["restarted"]}
            if names[name] is MEANS.get(name) and senders and set(senders) <= owns.keys():
                mean = np.mean([owns[each] for each in senders], axis=0)
                after = next(iter(told.values()))["after"]
                np.testing.assert_allclose(after, mean, rtol=1e-4, atol=1e-5, err_msg=f"{name} {number}")
            taken_part[name, number] = senders
    return taken_part


def job_number(job, rank):
    return job.events(rank, "attached")[-1]["number"]


@pytest.mark.parametrize(
    ("victims", "names"),
    [([0], ["sparse", "momentum"]), pytest.param([1, 3], list(ALL), marks=pytest.mark.slow)],
    ids=["the lead", "two at once"],
)
def test_survivors_go_on_with_the_mean_of_those_who_are_left(job, victims, names):
    algorithms = {name: ALL[name] for name in names}
    left = [rank for rank in range(4) if rank not in victims]
    with job(4, algorithms) as ranks:
        ranks.start()
        ranks.wait_for_rounds(range(4), 4)
        ranks.kill(*victims)
        ranks.wait_for_rounds(left, 6)
        ranks.stop()
        taken_part = check_exchanges(ranks, range(4), algorithms)
        for name in algorithms:
            assert list(range(4)) in [senders for (of, _), senders in taken_part.items() if of == name]
            last = max(number for (of, number) in taken_part if of == name and taken_part[of, number])
            before_end = [taken_part[name, number] for number in range(last - 4, last - 2)]
            assert before_end == [left, left], name
            for rank in left:
                (ended,) = ranks.events(rank, "ended", name)
                assert ended["stats"]["lost"] == victims
                assert ended["stats"]["restarts"] == 0


@pytest.mark.parametrize(
    "algorithm",
    [
        pytest.param(
            SparseLoCo(inner_steps=4, chunk=8, k=2, outer_momentum=0.5, peer_timeout=2.0, grace=1.0),
            marks=pytest.mark.slow,
        ),
        SparseLoCo(inner_steps=6, overlap=3, fragments=3, chunk=8, k=2, peer_timeout=2.0, grace=1.0),
        pytest.param(DiLoCo(inner_steps=4, overlap=1, peer_timeout=2.0, grace=1.0), marks=pytest.mark.slow),
    ],
    ids=["sparse", "streamed", "dense"],
)
def test_a_rank_that_was_stopped_is_left_out_and_catches_up(job, algorithm):
    algorithms = {"one": algorithm}
    with job(3, algorithms) as ranks:
        ranks.start()
        ranks.wait_for_rounds(range(3), 4)
        ranks.signal(1, signal.SIGSTOP)
        ranks.wait_for_rounds([0, 2], 8)
        ranks.signal(1, signal.SIGCONT)
        ranks.wait_for([1], "returned")
        ranks.wait_for_rounds(range(3), 6)
        ranks.stop()
        taken_part = check_exchanges(ranks, range(3), algorithms)
        sent = [senders for _, senders in sorted(taken_part.items()) if senders]
        assert [0, 2] in sent
        assert sent[-4] == [0, 1, 2]
        for returned in ranks.events(1, "returned"):
            assert returned["model_is_theta"]
            assert returned["residual"] == 0.0
        ended = [ranks.events(rank, "ended")[0] for rank in range(3)]
        assert ended[1]["stats"]["restarts"] == len(ranks.events(1, "returned"))
        steps = [each["step"] for each in ended]
        assert max(steps) - min(steps) <= 2 * algorithm.inner_steps  # in step with the others again


@pytest.mark.parametrize(
    "name",
    [pytest.param("sparse", marks=pytest.mark.slow), "streamed", pytest.param("momentum", marks=pytest.mark.slow)],
)
def test_a_late_process_takes_the_model_and_an_empty_residual_and_one_that_leaves_is_not_lost(job, name):
    algorithms = {name: ALL[name]}
    with job(2, algorithms) as ranks:
        ranks.start()
        ranks.wait_for_rounds(range(2), 4)
        ranks.start([2], join={name: ranks.events(1, "attached")[-1]["address"]})
        ranks.wait_for([2], "attached")
        ranks.wait_for_rounds(range(3), 5)
        (ranks.folder / "leave-1").touch()
        ranks.wait_for([1], "ended")
        ranks.wait_for_rounds([0, 2], 5)
        ranks.stop()
        taken_part = check_exchanges(ranks, range(3), algorithms)
        (came,) = ranks.events(2, "attached")
        assert came["model_is_theta"]
        assert came["residual"] == 0.0
        assert came["number"] == 2
        assert taken_part[name, came["done"]] == [0, 1]
        assert taken_part[name, came["done"] + 1] == [0, 1, 2]
        theta = {each["done"]: each["theta"] for each in ranks.events(0, "exchange")}
        assert came["theta"] == theta[came["done"]]
        for rank in (0, 2):
            assert ranks.events(rank, "ended")[0]["stats"]["lost"] == []
        assert ranks.events(0, "ended")[0]["stats"]["joined"] == [2]
