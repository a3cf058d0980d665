"""Mixing rules on simulated rows, against a few lines of numpy written from the papers."""

import math

import numpy as np
import pytest
import torch

from distopt.errors import ConfigError, StateMismatchError
from distopt.gossip import (
    DPSGD,
    A2CiD2,
    Choco,
    EdgeList,
    Exponential,
    Gossip,
    GradientTracking,
    Mixing,
    NoLoCo,
    OnePeerExponential,
    PushSum,
    QuasiGlobalMomentum,
    RandomMatchings,
    Ring,
    SignCodec,
    Star,
    TopKCodec,
)
from distopt.gossip.correction import Correction, Segment
from distopt.gossip.participant import Participant
from distopt.gossip.simulated_mixer import SimulatedExchange

NODES, SIZE, LR = 8, 6, 0.1
_random = np.random.default_rng(0)
CURVATURE = _random.uniform(0.5, 2.0, (NODES, SIZE))
OPTIMA = _random.standard_normal((NODES, SIZE))
START = _random.standard_normal((NODES, SIZE))
BEST = (CURVATURE * OPTIMA).sum(0) / CURVATURE.sum(0)  # of the sum of the nodes' losses
DIRECTED = EdgeList(edges=(*((i, (i + 1) % NODES) for i in range(NODES)), (0, 4), (3, 1)), directed=True)
GOSSIPS = {
    "d-psgd": Gossip(topology="ring", correction="off"),
    "d-psgd overlapped": Gossip(topology="ring", exchange="overlapped", correction="off"),
    "d-psgd every 3": Gossip(topology="one-peer-exponential", every=3, correction="off"),
    "push-sum": Gossip(topology=DIRECTED, mixing="push-sum", correction="off"),
    "choco top-k": Gossip(topology="ring", mixing=Choco(codec=TopKCodec(density=0.34), gamma=0.3), correction="off"),
    "choco sign": Gossip(topology="ring", mixing=Choco(codec=SignCodec(), gamma=0.3), correction="off"),
    "quasi-global": Gossip(topology="ring", mixing=QuasiGlobalMomentum(beta=0.5), correction="off"),
    "gradient tracking": Gossip(topology="ring", mixing="gradient-tracking"),
    "noloco": Gossip(topology="random-matchings", mixing=NoLoCo(), every=5),
    "push-sum overlapped": Gossip(topology=DIRECTED, mixing="push-sum", correction="off", exchange="overlapped"),
    "a2cid2 overlapped": Gossip(topology=RandomMatchings(of=Ring()), mixing=A2CiD2(), exchange="overlapped"),
    "a2cid2": Gossip(topology=RandomMatchings(of=Ring()), mixing=A2CiD2()),
}
KEEPS_MEAN = [name for name in GOSSIPS if not name.startswith(("noloco",))]


def gradient(x):
    return CURVATURE * (x - OPTIMA)


def run(gossip, steps, *, start=START, lr=LR, grad=gradient, segments=()):
    """The rows after each step, as float64."""
    rows = torch.tensor(start)
    exchange = SimulatedExchange(gossip.graphs, len(start), rows.device)
    node = Participant(gossip, gossip.surroundings(len(start)), [rows], [list(segments)], exchange.perform)
    seen = []
    for _ in range(steps):
        grads = torch.tensor(grad(rows.numpy()))
        node.gradients_([grads])
        rows.sub_(grads, alpha=lr)
        node.stepped_([rows], [lr])
        seen.append(rows.numpy().copy())
    node.settle_([rows])
    return np.stack([*seen, rows.numpy()])


def weights(gossip, number=0, size=NODES):
    return gossip.graphs.graph(size, number).weights


@pytest.mark.parametrize("name", GOSSIPS)
def test_without_gradients_all_agree_on_the_mean(name):
    rows = run(GOSSIPS[name], 3000 if name == "choco sign" else 1200, grad=np.zeros_like)
    np.testing.assert_allclose(rows[-1], np.broadcast_to(rows[-1].mean(0), (NODES, SIZE)), rtol=0, atol=1e-6)
    if name in KEEPS_MEAN:
        np.testing.assert_allclose(rows[-1].mean(0), START.mean(0), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in KEEPS_MEAN if not name.startswith("push-sum")])
def test_the_mean_is_that_of_all_updates_to_1e_12(name):
    """Exchanges change no mean: it moves by the optimizer's steps alone."""
    gossip, moved = GOSSIPS[name], []

    def recorded(x):
        moved.append(gradient(x))
        return moved[-1]

    rows = run(gossip, 40, grad=recorded)
    if name in ("quasi-global", "gradient tracking"):
        return  # what the optimizer takes is not the gradient: see their oracles
    expected = START.mean(0) - LR * sum(g.mean(0) for g in moved)
    np.testing.assert_allclose(rows[-1].mean(0), expected, rtol=0, atol=1e-12)


def test_d_psgd_adapts_then_combines():
    gossip, x = GOSSIPS["d-psgd"], START
    for found in run(gossip, 5)[:5]:
        x = weights(gossip) @ (x - LR * gradient(x))
        np.testing.assert_allclose(found, x, rtol=0, atol=1e-13)


def test_overlapped_d_psgd_combines_while_it_adapts():
    """`x <- W x - lr g(x)`, the exchange of x under way while g(x) is computed; at first there is none."""
    gossip = GOSSIPS["d-psgd overlapped"]
    found = run(gossip, 5)
    x = START - LR * gradient(START)
    np.testing.assert_allclose(found[0], x, rtol=0, atol=1e-13)
    for number in range(1, 5):
        x = weights(gossip) @ x - LR * gradient(x)
        np.testing.assert_allclose(found[number], x, rtol=0, atol=1e-13)
    np.testing.assert_allclose(found[-1], weights(gossip) @ x, rtol=0, atol=1e-13)


def test_every_third_step_is_an_exchange_and_the_rounds_go_on():
    gossip, x = GOSSIPS["d-psgd every 3"], START
    for step, found in enumerate(run(gossip, 9)[:9]):
        x = x - LR * gradient(x)
        if step % 3 == 2:
            x = weights(gossip, step // 3) @ x
        np.testing.assert_allclose(found, x, rtol=0, atol=1e-13)


def test_push_sum_takes_gradients_at_the_ratio_and_keeps_the_sum():
    gossip = GOSSIPS["push-sum"]
    push = weights(gossip)
    assert not np.allclose(push.sum(1), 1)
    x, w = START, np.ones((NODES, 1))
    for found in run(gossip, 6)[:6]:
        x = push @ (x - LR * gradient(x / w))
        w = push @ w
        np.testing.assert_allclose(found, x / w, rtol=0, atol=1e-13)
    assert not np.allclose(w, 1)


def test_what_is_under_way_in_push_sum_counts_as_the_sender_s():
    """`x <- x + (P - I) x_sent - lr g(z)`, likewise w, and z moves by what x moved while it was sent."""
    gossip, push = GOSSIPS["push-sum overlapped"], weights(GOSSIPS["push-sum overlapped"])
    found = run(gossip, 6)
    x, w, z, updates = START, np.ones((NODES, 1)), START, np.zeros_like(START)
    for number in range(6):
        step = -LR * gradient(z)
        sent, x, z = x, x + step, z + step
        updates = updates + step
        if number:
            x, w = push @ sent + step, push @ w
            z = push @ sent / w + step
        np.testing.assert_allclose(found[number], z, rtol=0, atol=1e-13)
        np.testing.assert_allclose(x.sum(0), (START + updates).sum(0), rtol=0, atol=1e-12)
    assert not np.allclose(w, 1)


def test_push_sum_is_d_psgd_where_the_weights_keep_the_mean():
    same = Gossip(topology="exponential", mixing="push-sum", correction="off")
    np.testing.assert_allclose(
        run(same, 6), run(Gossip(topology="exponential", correction="off"), 6), rtol=0, atol=1e-14
    )


def test_choco_with_everything_sent_and_gamma_1_is_d_psgd_of_what_is_known():
    gossip = Gossip(topology="ring", mixing=Choco(codec=TopKCodec(density=1.0), gamma=0.7), correction="off")
    x, known = START, np.zeros_like(START)
    for found in run(gossip, 5)[:5]:
        x = x - LR * gradient(x)
        x = x + 0.7 * (weights(gossip) @ known - known)
        known = x
        np.testing.assert_allclose(found, x, rtol=0, atol=1e-6)  # values travel as float32


def test_choco_s_oracle_with_signs():
    gossip, x = GOSSIPS["choco sign"], START
    known, average = np.zeros_like(START), np.zeros_like(START)
    for found in run(gossip, 5)[:5]:
        x = x - LR * gradient(x)
        x = x + 0.3 * (average - known)
        sent = np.abs(x - known).mean(1, keepdims=True) * np.where(x - known >= 0, 1.0, -1.0)
        known, average = known + sent, average + weights(gossip) @ sent
        np.testing.assert_allclose(found, x, rtol=0, atol=1e-13)


def test_quasi_global_momentum_s_oracle():
    gossip, x, m = GOSSIPS["quasi-global"], START, np.zeros_like(START)
    for found in run(gossip, 6)[:6]:
        new = weights(gossip) @ (x - LR * (gradient(x) + 0.5 * m))
        m = 0.5 * m + 0.5 * (x - new) / LR
        x = new
        np.testing.assert_allclose(found, x, rtol=0, atol=1e-12)


def test_gradient_tracking_s_oracle_and_its_exact_limit():
    gossip, x = GOSSIPS["gradient tracking"], START
    y, before = np.zeros_like(START), np.zeros_like(START)
    for found in run(gossip, 6)[:6]:
        y = y + gradient(x) - before
        np.testing.assert_allclose(y.mean(0), gradient(x).mean(0), rtol=0, atol=1e-12)
        before = gradient(x)
        x, y = weights(gossip) @ (x - LR * y), weights(gossip) @ y
        np.testing.assert_allclose(found, x, rtol=0, atol=1e-12)
    last = run(gossip, 2000)[-1]
    np.testing.assert_allclose(last, np.broadcast_to(BEST, last.shape), rtol=0, atol=1e-9)
    plain = run(GOSSIPS["d-psgd"], 2000)[-1]
    assert np.abs(plain - BEST).max() > 1e-2  # what it is for


def test_noloco_s_oracle():
    gossip = GOSSIPS["noloco"]
    phi, m, theta = START, np.zeros_like(START), START
    for step, found in enumerate(run(gossip, 20)[:20]):
        theta = theta - LR * gradient(theta)
        if step % 5 == 4:
            w = weights(gossip, step // 5)
            m = 0.5 * m + 0.7 * (w @ (theta - phi)) + 0.7 * (w @ phi - phi)
            phi = phi + m
            theta = phi
        np.testing.assert_allclose(found, theta, rtol=0, atol=1e-12)


def test_a2cid2_s_oracle():
    gossip = GOSSIPS["a2cid2"]
    around = gossip.surroundings(NODES)
    eta, alpha = gossip.rule.begin(torch.zeros(1, 1), around)["constants"].tolist()
    assert 0 < eta < 0.5 < alpha
    x, copy = START, START
    for number, found in enumerate(run(gossip, 10)[:10]):
        step = LR * gradient(x)
        x, copy = x - step, copy - step
        e = math.exp(-2 * eta)
        x, copy = ((1 + e) * x + (1 - e) * copy) / 2, ((1 - e) * x + (1 + e) * copy) / 2
        m = 2 * (x - weights(gossip, number) @ x)
        x, copy = x - m / 2, copy - alpha * m
        np.testing.assert_allclose(found, x, rtol=0, atol=1e-12)


def test_overlapped_a2cid2_flows_before_it_sends_and_takes_in_what_came_of_that():
    gossip = GOSSIPS["a2cid2 overlapped"]
    eta, alpha = gossip.rule.begin(torch.zeros(1, 1), gossip.surroundings(NODES))["constants"].tolist()
    found = run(gossip, 8)
    x = copy = START
    for number in range(8):
        step = LR * gradient(x)
        if number:
            e = math.exp(-2 * eta)
            sx, sy = ((1 + e) * x + (1 - e) * copy) / 2, ((1 - e) * x + (1 + e) * copy) / 2
            m = 2 * (sx - weights(gossip, number - 1) @ sx)
            x, copy = sx - m / 2, copy + (sy - alpha * m - copy)
        x, copy = x - step, copy - step
        np.testing.assert_allclose(found[number], x, rtol=0, atol=1e-12)


def test_a2cid2_agrees_sooner_on_a_ring_at_equal_messages():
    start = np.random.default_rng(1).standard_normal((32, 4))
    pairs = RandomMatchings(of=Ring())
    rounds = {}
    for name in ("a2cid2", "d-psgd"):
        rows = run(Gossip(topology=pairs, mixing=name, correction="off"), 1500, start=start, grad=np.zeros_like)
        left = np.abs(rows - start.mean(0)).max((1, 2))
        rounds[name] = int(np.argmax(left < 1e-3))
    assert 0 < 3 * rounds["a2cid2"] < rounds["d-psgd"], rounds


@pytest.mark.parametrize(
    "codec", [TopKCodec(density=0.3), TopKCodec(density=0.3, values="bf16", indices="block16"), SignCodec()]
)
@pytest.mark.parametrize("numel", [1, 7, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_codes_have_the_length_they_say_and_come_closer(codec, numel, dtype):
    row = torch.randn(numel, generator=torch.Generator().manual_seed(numel), dtype=dtype)
    code = codec.encode(row)
    assert code.dtype == torch.uint8
    assert code.shape == (codec.num_bytes(numel),)
    decoded = codec.decode(code, numel, dtype)
    assert decoded.dtype == dtype
    assert (row - decoded).norm() < row.norm() or numel == 1
    if isinstance(codec, SignCodec):
        torch.testing.assert_close(decoded.abs(), row.abs().mean().expand(numel))
        assert torch.equal(decoded >= 0, row >= 0)


def test_correction_keeps_the_spread_of_tensors_and_leaves_one_dimension_alone_in_auto():
    start = np.random.default_rng(2).standard_normal((16, 3000))
    segments = [Segment("weight", 0, 2000, 2), Segment("bias", 2000, 3000, 1)]
    spread = {}
    for mode in ("off", "auto", "on"):
        rows = run(Gossip(correction=mode), 1, start=start, grad=np.zeros_like, segments=segments)[-1]
        spread[mode] = [rows[:, :2000].var(1).mean(), rows[:, 2000:].var(1).mean()]
        np.testing.assert_allclose(rows.mean(), start.mean(), rtol=0, atol=1e-3)
    assert spread["off"] == pytest.approx([0.5, 0.5], rel=0.1)
    assert spread["auto"] == pytest.approx([1.0, 0.5], rel=0.1)
    assert spread["on"] == pytest.approx([1.0, 1.0], rel=0.1)


def test_auto_leaves_models_alone_that_resemble_each_other():
    base = np.random.default_rng(3).standard_normal((1, 2000))
    start = base + 0.1 * np.random.default_rng(4).standard_normal((8, 2000))
    segments = [Segment("weight", 0, 2000, 2)]
    kept = [
        run(Gossip(correction=mode), 3, start=start, grad=np.zeros_like, segments=segments) for mode in ("auto", "off")
    ]
    np.testing.assert_array_equal(*kept)


@pytest.mark.parametrize("mixing", [PushSum(), Choco(codec=TopKCodec(density=1.0), gamma=0.9), QuasiGlobalMomentum()])
def test_every_rule_that_can_correct_does(mixing):
    start = np.random.default_rng(5).standard_normal((8, 2000))
    segments = [Segment("weight", 0, 2000, 2)]
    found = {}
    for mode in ("off", "on"):
        gossip = Gossip(topology="ring", mixing=mixing, correction=mode)
        found[mode] = run(gossip, 4, start=start, grad=np.zeros_like, segments=segments)[-1].var(1).mean()
    assert found["off"] < 0.5
    assert found["on"] == pytest.approx(1.0, rel=0.25)


def test_choco_corrects_the_rows_and_not_what_others_know_of_them():
    start = np.random.default_rng(5).standard_normal((8, 2000))
    rows, gamma = torch.tensor(start), 0.7
    gossip = Gossip(topology="ring", mixing=Choco(codec=TopKCodec(density=1.0), gamma=gamma), correction="on")
    exchange = SimulatedExchange(gossip.graphs, 8, rows.device)
    segments = [Segment("weight", 0, 2000, 2)]
    node = Participant(gossip, gossip.surroundings(8), [rows], [segments], exchange.perform)
    node.stepped_([rows], [0.0])
    plain = rows.numpy() + gamma * (weights(gossip, size=8) @ start - start)
    node.stepped_([rows], [0.0])
    known = node.state_dict()["rule"][0]["known"].numpy()
    np.testing.assert_allclose(known, plain, rtol=0, atol=1e-6)  # values travel as float32
    assert (rows.numpy().var(1) > 1.2 * known.var(1)).all()


def test_push_sum_s_correction_has_the_variances_of_the_ratios():
    start = np.random.default_rng(6).standard_normal((NODES, 4000))
    segments = [Segment("weight", 0, 4000, 2)]
    gossip = Gossip(topology=DIRECTED, mixing="push-sum", correction="on")
    rows = run(gossip, 3, start=start, grad=np.zeros_like, segments=segments)
    np.testing.assert_allclose(rows[0].var(1), 1.0, rtol=0.12)
    np.testing.assert_allclose(rows[2].var(1), 1.0, rtol=0.12)  # now that weights differ, and x is not z


@pytest.mark.parametrize(("left", "corrected"), [(0.88, True), (0.92, False)])
def test_auto_corrects_below_nine_tenths(left, corrected):
    random = np.random.default_rng(7)
    basis, _ = np.linalg.qr(np.column_stack([np.ones(500), random.standard_normal((500, 2))]))
    first, second = (basis[:, column] * math.sqrt(500) for column in (1, 2))  # of mean 0 and variance 1, unrelated
    likeness = 2 * left - 1
    pair = np.stack([first, likeness * first + math.sqrt(1 - likeness**2) * second])
    rows = torch.tensor(pair.mean(0, keepdims=True))
    correction = Correction("auto", [Segment("weight", 0, 500, 2)])
    correction.restore_(rows, torch.ones(1, 1, dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64))
    assert float(correction.ratio) == pytest.approx(left)
    assert float(rows.var(correction=0)) == pytest.approx(1.0 if corrected else left)


def factors(average, targets, largest):
    return np.clip(np.sqrt(targets / average.var(1)), 1.0, largest)[:, None]


def respread(average, factor):
    mean = average.mean(1, keepdims=True)
    return (average - mean) * factor + mean


OPPOSED = np.random.default_rng(8).standard_normal((NODES, 50)) * np.arange(1, NODES + 1)[:, None] / 4
OPPOSED[1::2] = (
    0.1 * OPPOSED[1::2] - OPPOSED[::2]
)  # neighbours cancel more than unrelated ones: the factor is at its bound


def test_d_psgd_s_correction_s_oracle_at_its_bound():
    gossip, x, reached = Gossip(topology=Star(), correction="on"), OPPOSED, 0
    around, segments = weights(gossip), [Segment("weight", 0, 50, 2)]
    largest = 1 / np.sqrt((around**2).sum(1))
    for found in run(gossip, 4, start=OPPOSED, grad=np.zeros_like, segments=segments)[:4]:
        factor = factors(around @ x, around @ x.var(1), largest)
        reached += (factor[:, 0] >= largest).sum()
        x = respread(around @ x, factor)
        np.testing.assert_allclose(found, x, rtol=1e-10, atol=1e-12)
    assert 0 < reached < 4 * NODES


def test_push_sum_s_correction_s_oracle_at_its_bound():
    gossip = Gossip(topology=DIRECTED, mixing="push-sum", correction="on")
    segments = [Segment("weight", 0, 50, 2)]
    push, z, w, reached = weights(gossip), OPPOSED, np.ones((NODES, 1)), 0
    for found in run(gossip, 4, start=OPPOSED, grad=np.zeros_like, segments=segments)[:4]:
        pushed = push @ w
        parts = push * w.T / pushed
        average, largest = parts @ z, 1 / np.sqrt((parts**2).sum(1))
        factor = factors(average, parts @ z.var(1), largest)
        reached += (factor[:, 0] >= largest).sum()
        z, w = respread(average, factor), pushed
        np.testing.assert_allclose(found, z, rtol=1e-10, atol=1e-12)
    assert not np.allclose(w, 1)
    assert 0 < reached < 4 * NODES


def test_choco_s_correction_s_oracle_at_its_bound():
    gamma = 0.7
    gossip = Gossip(topology="ring", mixing=Choco(codec=TopKCodec(density=1.0), gamma=gamma), correction="on")
    around, segments = weights(gossip), [Segment("weight", 0, 50, 2)]
    x, known = OPPOSED, np.zeros_like(OPPOSED)
    largest = 1 / (1 - gamma + gamma * np.sqrt((around**2).sum(1)))
    reached = 0
    for found in run(gossip, 4, start=OPPOSED, grad=np.zeros_like, segments=segments)[:4]:
        targets = (1 - gamma) * x.var(1) + gamma * around @ x.var(1)
        plain = x + gamma * (around @ known - known)
        factor = factors(plain, targets, largest)
        reached += (factor[:, 0] >= largest).sum()
        x, known = respread(plain, factor), plain
        np.testing.assert_allclose(found, x, rtol=0, atol=1e-5)  # values travel as float32
    assert 0 < reached < 4 * NODES


def test_statistics_that_fall_while_an_exchange_is_under_way_do_not_become_negative():
    gossip = Gossip(topology="complete", exchange="overlapped", correction="off")
    rows, moments = torch.zeros(2, 3), torch.tensor([[1.0], [0.0]])
    exchange = SimulatedExchange(gossip.graphs, 2, rows.device)
    node = Participant(gossip, gossip.surroundings(2), [rows], [[]], exchange.perform)
    node.stepped_([rows], [0.0], [moments])
    moments[0] = 0.1
    node.settle_([rows], [moments])
    assert moments.flatten().tolist() == pytest.approx([0.1, 0.5])


def test_what_cannot_be_combined_is_refused():
    for name in ("gradient-tracking", "noloco"):
        with pytest.raises(ConfigError, match=rf"correction='on' with '{name}'; use correction='off', or d-psgd"):
            Gossip(mixing=name, correction="on")
    with pytest.raises(ConfigError, match=r"exchange='overlapped' needs .*got 'choco'; use exchange='synchronous', or"):
        Gossip(mixing="choco", exchange="overlapped")
    with pytest.raises(ConfigError, match=r"same graph in every round, got 'one-peer-exponential'; use 'ring'"):
        Gossip(mixing="choco").surroundings(4)
    with pytest.raises(ConfigError, match=r"d-psgd needs weights whose rows add up to 1 .* use mixing='push-sum'"):
        Gossip(topology=DIRECTED).surroundings(NODES)
    with pytest.raises(ConfigError, match=r"gradient-tracking must exchange in every step, got every=2"):
        Gossip(mixing="gradient-tracking", every=2).surroundings(4)
    with pytest.raises(ConfigError, match=r"a2cid2 must have ranks that meet in pairs, got 'ring'"):
        Gossip(topology="ring", mixing="a2cid2").surroundings(4)
    with pytest.raises(ConfigError, match=r"'topology' must be one of .*got 'rign'; perhaps 'ring' is meant"):
        Gossip(topology="rign")
    with pytest.raises(ConfigError, match=r"must be connected"):
        Gossip(topology=EdgeList(edges=((0, 1), (2, 3)))).surroundings(4)


@pytest.mark.parametrize("name", GOSSIPS)
def test_a_configuration_survives_json(name):
    import json

    gossip = GOSSIPS[name]
    assert Gossip.from_dict(json.loads(json.dumps(gossip.to_dict()))) == gossip


@pytest.mark.parametrize("name", GOSSIPS)
def test_the_state_goes_on_where_it_was_to_the_bit(name):
    gossip = GOSSIPS[name]
    around = gossip.surroundings(NODES)

    def begun(rows, first=0):
        exchange = SimulatedExchange(gossip.graphs, NODES, rows.device)
        exchange.round = first
        return Participant(gossip, around, [rows], [[]], exchange.perform), exchange

    def steps(node, rows, count):
        for _ in range(count):
            grads = torch.tensor(gradient(rows.numpy()))
            node.gradients_([grads])
            rows.sub_(grads, alpha=LR)
            node.stepped_([rows], [LR])
        node.settle_([rows])

    rows = torch.tensor(START)
    node, exchange = begun(rows)
    steps(node, rows, 7)
    state, at = node.state_dict(), rows.clone()
    saved = {**state, "rule": [{key: tensor.clone() for key, tensor in state["rule"][0].items()}]}
    again, _ = begun(torch.zeros_like(at), exchange.round)
    steps(node, rows, 7)
    again.load_state_dict(saved)
    steps(again, at, 7)
    assert torch.equal(rows, at)
    tracking = Gossip(topology="ring", mixing=GradientTracking())
    other = Participant(tracking, around, [at], [[]], exchange.perform)
    if name != "gradient tracking":
        with pytest.raises(StateMismatchError, match="the state must be of gradient-tracking"):
            other.load_state_dict(saved)


def test_every_registered_rule_is_tested_here():
    assert {type(gossip.rule) for gossip in GOSSIPS.values()} == set(Mixing._known.values())
    assert {DPSGD, OnePeerExponential, Exponential}  # imported for the reader
