"""The mathematics of one fragment: its laws, oracles written out, and what it refuses."""

import pytest
import torch

from distopt.errors import ConfigError, DecodeError, NonFiniteGradientError, StateMismatchError
from distopt.local import DiLoCo, Fragment, SparseLoCo, partition

SIZES = (70, 1, 33, 64)
EVERYTHING = {"chunk": 16, "k": 16, "values": "fp32", "decay": 1.0}
SPARSE = [
    SparseLoCo(chunk=16, k=3, decay=1.0, values=values, outer_lr=0.5)
    for values in ("2bit", "2bit-bins", "int8", "fp16", "fp32")
]


def fragments(algorithm, ranks=3):
    start = torch.randn(sum(SIZES), generator=torch.Generator().manual_seed(0))
    return [Fragment(algorithm, SIZES, start) for _ in range(ranks)]


def models(ranks=3, seed=1):
    return torch.randn(ranks, sum(SIZES), generator=torch.Generator().manual_seed(seed))


def exchange(parts, rows):
    """One round; the pseudo-gradients, float64."""
    deltas = torch.stack([part.theta.double() - row.double() for part, row in zip(parts, rows, strict=True)])
    sent = [part.contribute_(row) for part, row in zip(parts, rows, strict=True)]
    gathered = torch.stack(sent)
    for part in parts:
        part.take_(gathered.sum(0) if part.reduces else gathered, len(parts))
    return deltas


@pytest.mark.parametrize("algorithm", SPARSE, ids=lambda made: made.values)
def test_no_mass_is_lost(algorithm):
    parts = fragments(algorithm)
    start, total = parts[0].theta.double(), torch.zeros(sum(SIZES), dtype=torch.float64)
    for round in range(8):
        total += exchange(parts, parts[0].theta + models(seed=round)).sum(0)
    moved = (start - parts[0].theta.double()) / algorithm.outer_lr
    held = sum(part.residual.double() for part in parts)
    torch.testing.assert_close(total, len(parts) * moved + held, rtol=0, atol=2e-4)
    assert float(held.abs().max()) > 1


@pytest.mark.parametrize("average", ["world", "senders"])
def test_sparseloco_is_its_algorithm_written_out(average):
    algorithm = SparseLoCo(
        chunk=16, k=3, decay=0.9, values="fp32", average=average, outer_lr=0.8, outer_momentum=0.5, nesterov=True
    )
    parts = fragments(algorithm)
    theta, momentum = parts[0].theta.clone(), torch.zeros(sum(SIZES))
    residuals = torch.zeros(3, sum(SIZES))
    for round in range(6):
        rows = parts[0].theta + models(seed=round)
        sent = torch.zeros_like(residuals)
        for rank in range(3):
            residuals[rank] = 0.9 * residuals[rank] + (theta - rows[rank])
            start = 0
            for size in SIZES:
                for begin in range(start, start + size, 16):
                    chunk = slice(begin, min(begin + 16, start + size))
                    count = -(-3 * (chunk.stop - chunk.start) // 16)
                    largest = residuals[rank, chunk].abs().topk(count).indices + begin
                    sent[rank, largest] = residuals[rank, largest]
                start += size
        residuals -= sent
        mean = sent.sum(0) / (3 if average == "world" else (sent != 0).sum(0).clamp(min=1))
        momentum = 0.5 * momentum + mean
        theta = theta - 0.8 * (mean + 0.5 * momentum)
        exchange(parts, rows)
        torch.testing.assert_close(parts[0].theta, theta, rtol=0, atol=1e-5)
        for part, residual in zip(parts, residuals, strict=True):
            torch.testing.assert_close(part.residual, residual, rtol=0, atol=1e-5)


def test_senders_are_averaged_over_who_has_sent():
    parts = fragments(SparseLoCo(chunk=16, k=1, values="fp32", average="senders"), ranks=3)
    start = parts[0].theta.clone()
    rows = start.repeat(3, 1)
    rows[0, 5] -= 6.0  # alone
    rows[1, 40] -= 2.0
    rows[2, 40] -= 4.0
    exchange(parts, rows)
    moved = start - parts[0].theta
    assert moved[5] == pytest.approx(6.0, rel=1e-6)
    assert moved[40] == pytest.approx(3.0, rel=1e-6)
    assert moved.count_nonzero() == 2


@pytest.mark.parametrize(
    "algorithm", [SparseLoCo(**EVERYTHING), DiLoCo(outer_lr=1.0, outer_momentum=0, nesterov=False)]
)
def test_one_step_of_sgd_each_is_data_parallel_sgd(algorithm):
    """Also the sign."""
    parts = fragments(algorithm)
    gradients = models()
    parameter = torch.nn.Parameter(parts[0].theta.clone())
    parameter.grad = gradients.mean(0)
    torch.optim.SGD([parameter], lr=0.1).step()
    exchange(parts, parts[0].theta - 0.1 * gradients)
    torch.testing.assert_close(parts[0].theta, parameter.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("kind", [DiLoCo, SparseLoCo])
def test_the_outer_step_is_that_of_torch(kind, nesterov):
    settings = {"outer_lr": 0.7, "outer_momentum": 0.9, "nesterov": nesterov}
    parts = fragments(kind(**settings, **(EVERYTHING if kind is SparseLoCo else {})))
    parameter = torch.nn.Parameter(parts[0].theta.clone())
    outer = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=nesterov)
    for round in range(5):
        rows = models(seed=round)
        parameter.grad = parameter.detach() - rows.mean(0)
        outer.step()
        exchange(parts, rows)
        torch.testing.assert_close(parts[0].theta, parameter.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("algorithm", [*SPARSE, DiLoCo()], ids=lambda made: made.name + getattr(made, "values", ""))
def test_all_ranks_hold_the_same_bits_and_a_contribution_has_the_size_that_was_said(algorithm):
    parts = fragments(algorithm)
    for round in range(3):
        exchange(parts, models(seed=round))
    for part in parts:
        assert torch.equal(part.theta, parts[0].theta)
        sent = part.contribute_(models()[0])
        assert sent.nbytes == part.nbytes
        assert sent.dtype == (torch.float32 if part.reduces else torch.uint8)


def test_twins_share_what_is_replicated():
    first = fragments(SparseLoCo(outer_momentum=0.5), 1)[0]
    second = first.twin()
    apart = fragments(SparseLoCo(outer_momentum=0.5), 2)
    for round in range(3):
        rows = models(2, seed=round)
        exchange(apart, rows)
        first.take_(torch.stack([first.contribute_(rows[0]), second.contribute_(rows[1])]), 2)
    assert torch.equal(first.theta, apart[0].theta)
    assert torch.equal(second.theta, apart[0].theta)
    assert torch.equal(second.residual, apart[1].residual)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("algorithm", [SparseLoCo(chunk=16, k=3), DiLoCo()], ids=lambda made: made.name)
def test_nan_and_inf_are_refused_before_anything_changes(algorithm, bad):
    parts = fragments(algorithm)
    exchange(parts, models())
    before = [{n: t.clone() for n, t in part.state_dict().items() if t is not None} for part in parts]
    row = models(seed=2)[0]
    row[71] = bad
    assert parts[0].first_nonfinite(row) == 2
    assert parts[0].first_nonfinite(models()[0]) is None
    with pytest.raises(NonFiniteGradientError, match=r"NaN or Inf in tensor 2 of a fragment of 4; nothing was sent"):
        parts[0].contribute_(row)
    if parts[0].reduces:
        with pytest.raises(NonFiniteGradientError, match=r"mean of 3 .* model was not changed"):
            parts[0].take_(row, 3)
    else:
        with pytest.raises(DecodeError):
            parts[0].take_(torch.stack([parts[0].contribute_(models()[0]) ^ 1]), 1)
        parts[0].residual.copy_(before[0]["residual"])
    for part, held in zip(parts, before, strict=True):
        for name, tensor in held.items():
            assert torch.equal(part.state_dict()[name], tensor)


def test_a_state_goes_on_to_the_same_bits():
    algorithm = SparseLoCo(chunk=16, k=3, outer_momentum=0.5)
    parts, others = fragments(algorithm), fragments(algorithm)
    exchange(parts, models())
    for part, other in zip(parts, others, strict=True):
        other.load_state_dict({n: t.clone() for n, t in part.state_dict().items()})
    exchange(parts, models(seed=2))
    exchange(others, models(seed=2))
    for part, other in zip(parts, others, strict=True):
        assert torch.equal(part.theta, other.theta)
        assert torch.equal(part.residual, other.residual)
    with pytest.raises(StateMismatchError, match=r"momentum of a fragment must be torch.float32 \(168,\), got None"):
        parts[0].load_state_dict({**parts[0].state_dict(), "momentum": None})
    with pytest.raises(StateMismatchError, match=r"theta of a fragment must be .*\(168,\), got .*\(3,\)"):
        parts[0].load_state_dict({**parts[0].state_dict(), "theta": torch.zeros(3)})


def test_who_restarts_has_the_others_model_and_an_empty_residual():
    parts = fragments(SparseLoCo(chunk=16, k=3, outer_momentum=0.5))
    exchange(parts, models())
    late = fragments(SparseLoCo(chunk=16, k=3, outer_momentum=0.5), 1)[0]
    late.residual.fill_(1.0)
    late.restart_(parts[0].theta, parts[0].momentum)
    assert torch.equal(late.theta, parts[0].theta)
    assert torch.equal(late.momentum, parts[0].momentum)
    assert not late.residual.any()


@pytest.mark.parametrize(
    ("sizes", "count", "expected"),
    [
        ((5,), 1, [[0]]),
        ((5, 5, 5, 5), 2, [[0, 1], [2, 3]]),
        ((100, 1, 1, 1), 3, [[0], [1], [2, 3]]),
        ((1, 1, 1, 100), 2, [[0, 1, 2], [3]]),
        ((0, 0, 3), 3, [[0], [1], [2]]),
    ],
)
def test_a_model_is_parted_into_neighbours_of_about_equal_size(sizes, count, expected):
    assert [list(part) for part in partition(sizes, count)] == expected


def test_more_fragments_than_tensors_are_refused():
    with pytest.raises(ConfigError, match=r"fragments must be at most .* \(2\), got 3; use fewer"):
        partition((5, 5), 3)
