"""A million registered clients on one machine: what a few hundred of them leave behind, and nothing for the others."""

import textwrap

import pytest

MILLION = """
    import resource, sys
    import numpy as np
    import torch
    from torch import nn
    from distopt import federated

    torch.set_num_threads(1)

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2  # GiB

    inputs = torch.randn(1000, 500)
    labels = (inputs[:, 0] > 0).long()
    algorithm = federated.FederatedAlgorithm.from_dict({"algorithm": sys.argv[1]})
    before = peak()
    job = federated.Simulation(
        model=nn.Linear(500, 2),
        clients=federated.ClientData((inputs, labels), [np.array([i % 1000]) for i in range(1_000_000)]),
        algorithm=algorithm,
        local=federated.LocalTraining(steps=1),
        participation=federated.Bernoulli(probability=1e-5),
    )
    job.run(20)
    job.state_dict()
    print(len({client for row in job.history for client in row["participants"]}), peak() - before)
"""


@pytest.mark.job
@pytest.mark.parametrize("algorithm", ["fedau", "scaffold", "fedvarp"])
def test_a_million_registered_clients_take_less_than_a_gibibyte(warm_python, algorithm):
    ran = warm_python.run(textwrap.dedent(MILLION), algorithm)
    assert ran.returncode == 0, ran.stderr
    seen, gibibytes = map(float, ran.stdout.split())
    assert 100 < seen < 400
    assert gibibytes < 1.0
