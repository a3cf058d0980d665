"""Private jobs whose clients are elsewhere: the simulation's rounds but for the noise, and what a server refuses."""

import threading

import pytest
import torch
from test_private_jobs import CLIENTS, INPUTS, OF_JOB, PARTS, ROUNDS, TARGETS, build, loss_of_all, simulation, square

from distopt.comm import InProcess
from distopt.errors import ConfigError
from distopt.federated import DIFF2, ClientData, DPFedAvg, LocalTraining, Service, take_part

HARDLY_NOISY = {"epsilon": 1e14, "accountant": "closed-form"}
ALGORITHMS = {
    "diff2": DIFF2(interval=3, clip_difference=20.0, **OF_JOB, **HARDLY_NOISY),
    "distributed": DIFF2(interval=3, clip_difference=20.0, noise="distributed", **OF_JOB, **HARDLY_NOISY),
    "dp-fedavg": DPFedAvg(noise_multiplier=1e-7),
}


def data():
    return ClientData((INPUTS, TARGETS), PARTS)


def served(algorithm, rounds, **changed):
    """The model and the history of a server with two sites."""
    server, *ends = InProcess.connect(3)
    threads = [
        threading.Thread(
            target=take_part,
            kwargs={"model": build(), "clients": data(), "loss": square, "transport": end},
            daemon=True,
        )
        for end in ends
    ]
    for thread in threads:
        thread.start()
    model = build()
    with Service(
        model=model, num_clients=CLIENTS, algorithm=algorithm, evaluate=loss_of_all, transport=server, **changed
    ) as service:
        history = service.run(rounds)
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return model, history


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_service_s_rounds_are_the_simulation_s_but_for_the_noise(name):
    model, history = served(ALGORITHMS[name], 7)
    simulated = simulation(ALGORITHMS[name], mode="loop")
    simulated.run(7)
    expected = torch.cat([p.detach().reshape(-1) for p in simulated.model.parameters()])
    found = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    start = torch.cat([p.detach().reshape(-1) for p in build().parameters()])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert float((found - start).norm()) > 0.01
    for row, other in zip(history, simulated.history, strict=True):
        assert {**row, "loss": 0, "time_s": 0} == {**other, "loss": 0, "time_s": 0}
    assert history.last("epsilon") > 0


def test_a_service_ends_at_its_epsilon():
    _, history = served(DIFF2(**OF_JOB), 100)
    assert ROUNDS <= len(history) < 100
    assert history.last("epsilon") <= 3.0
    _, earlier = served(DIFF2(**OF_JOB), 100, stop_at_epsilon=2.8)
    assert 0 < len(earlier) < ROUNDS


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"algorithm": DIFF2(noise_seed=0, **OF_JOB)}, "noise_seed must be left out where clients are real, got 0"),
        ({"local": LocalTraining(steps=3)}, "local must be left out for 'diff2'"),
        ({"checkpoint": "run.pt", "checkpoint_every": 10}, "checkpoint_every must be 1 or 0 for 'diff2', got 10"),
        ({"num_clients": 5}, "num_clients must be that of the job, 5, got 4"),
    ],
)
def test_what_would_break_the_guarantee_is_refused_before_anybody_comes(changed, said):
    server, *_ = InProcess.connect(3)
    settings = {"model": build(), "num_clients": CLIENTS, "algorithm": DIFF2(**OF_JOB), "transport": server}
    with pytest.raises(ConfigError, match=said):
        Service(**{**settings, **changed})


def test_a_client_with_fewer_samples_than_the_noise_is_for_does_not_count(caplog):
    """The server does not know; the client refuses to answer, and the round does not count."""
    with caplog.at_level("WARNING", "distopt"):
        server, end = InProcess.connect(2)
        few = ClientData((INPUTS, TARGETS), [*PARTS[:3], PARTS[3][:7]])
        failed = []

        def take():
            try:
                take_part(model=build(), clients=few, loss=square, transport=end)
            except ConfigError as error:
                failed.append(error)

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        settings = {"model": build(), "num_clients": CLIENTS, "algorithm": DIFF2(**OF_JOB), "transport": server}
        with Service(**settings, deadline_s=2.0) as service:
            history = service.run(1)
        thread.join(30)
    assert "epsilon" in history.rows[0]
    assert history.rows[0]["epsilon"] == 0.0
    assert 3 in history.rows[0]["missed"]
