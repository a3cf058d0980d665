"""The app's default job in one process, without Flower: `python -m digits.simulation` prints the same result."""

from digits.task import LOCAL, evaluate, make_clients, make_model, make_participation, result
from distopt import federated

model = make_model()
job = federated.Simulation(
    model=model,
    clients=make_clients(100),
    algorithm=federated.FedAU(cutoff=50),
    local=LOCAL,
    participation=make_participation(100),
    evaluate=evaluate,
    evaluate_every=10,
    mode="loop",
)
print(result(job.run(100), model))
