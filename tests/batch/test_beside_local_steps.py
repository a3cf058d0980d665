"""A batch that grows beside DiLoCo and SparseLoCo: tests of what local steps have moved, on real ranks."""

import io

import pytest
import torch
from growing import Training
from test_adaptive_batch import Rows, gather, gathered

import distopt
from distopt.batch.estimator import Averages
from distopt.batch.sums import Sums

RANKS, INNER = 2, 3
ALGORITHMS = [
    distopt.DiLoCo(inner_steps=INNER),
    distopt.SparseLoCo(inner_steps=INNER, fragments=2, overlap=1),
]


def on_local(algorithm):
    training = Training(algorithm, eta=0.7, every=1, ema=2, max_batch=120, max_accumulation=4)
    rows = Rows(training)
    training.beside.observe_gradients(rows)
    training.run(40)
    training.batch.state_dict()
    stats = training.batch.stats()
    # The samples of a gradient are those of all the steps that it is made of.
    own = gather([sum(sizes) for sizes, *_ in training.trace])
    together = [sum(each) for each in zip(*own, strict=True)]
    averages = Averages(2)
    for number, row in enumerate(rows.rows[: stats["tests"]]):
        # a round is heard from its first fragment on, which is sent 2 steps into it where there are two
        last = INNER * (number + 1) if algorithm.fragments == 1 else INNER * number + 2
        samples = sum(together[max(0, last - INNER) : last]) / RANKS
        both = torch.stack(gathered(row.double()))
        mean = both.mean(0)
        sums = Sums(
            num_gradients=RANKS, samples=samples, squares=float(both.square().sum()), square_of_mean=float(mean @ mean)
        )
        averages.add(sums.quantities("norm"))
    assert stats["tests"] >= 12
    for name, value in averages.values.items():
        assert training.batch._averages.values[name] == pytest.approx(value, rel=1e-3), name
    assert stats["needed"] * INNER == pytest.approx(
        training.batch.algorithm.needed(training.batch._averages.values), rel=1e-6
    )
    assert training.batch.batch_size > 8
    assert len({str(each) for each in gather([stats["batch_size"], stats["noise_scale"]])}) == 1
    training.close()


def on_resume(algorithm, test):
    """Also where a checkpoint lies between an exchange and the test's end."""

    def make():
        return Training(algorithm, test=test, eta=0.7, every=1, ema=2, max_batch=60, probe=300)

    whole = make()
    cuts = []
    for _ in range(4):
        whole.run(4 if len(cuts) < 3 else 15)
        states = {name: torch.load(as_file(state), weights_only=True) for name, state in whole.states().items()}
        cuts.append((len(whole.trace), states))
    whole.close()
    for steps, states in cuts[:3]:
        again = make()
        again.load(states)
        again.run(len(whole.trace) - steps)
        assert again.trace == whole.trace[steps:]
        again.close()


def as_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


@pytest.mark.job
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_pseudo_gradients_are_tested_with_all_the_samples_of_their_steps(ranks, algorithm):
    ranks(RANKS)(on_local, algorithm)


@pytest.mark.job
@pytest.mark.parametrize(
    ("algorithm", "test"),
    [(distopt.DiLoCo(inner_steps=INNER, fragments=2, overlap=1), "augmented"), (ALGORITHMS[1], "norm")],
)
def test_resumed_to_the_same_bits(ranks, algorithm, test):
    ranks(RANKS)(on_resume, algorithm, test)
