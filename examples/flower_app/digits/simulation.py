"""The app's default job in one process, without Flower: `python -m digits.simulation` prints the same accuracy."""

from digits.task import LOCAL, evaluate, make_clients, make_model
from distopt import federated

job = federated.Simulation(
    model=make_model(),
    clients=make_clients(10),
    algorithm=federated.FedAU(cutoff=50),
    local=LOCAL,
    participation=federated.Bernoulli(probability=0.5),
    evaluate=evaluate,
    mode="loop",
)
print(f"test accuracy {job.run(40).last('accuracy')!r} after {job.round} rounds, refused {dict(job.refused)}")
