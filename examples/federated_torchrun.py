"""One FedAU run, in one process or on many machines: how it is started changes, and its result does not.

    python examples/federated_torchrun.py                                        # a simulation
    torchrun --nproc-per-node 4 examples/federated_torchrun.py                   # rank 0 serves three sites
    mpirun -n 4 python examples/federated_torchrun.py
    launch/netns_cluster.sh once 4 1gbit -- examples/federated_torchrun.py       # four hosts on this machine

By TCP, with `export DISTOPT_JOB_SECRET=...` on every machine:

    python examples/federated_torchrun.py --listen 192.0.2.1:7000 --sites 2
    python examples/federated_torchrun.py --server 192.0.2.1:7000 --sites 2 --rank 1      # and --rank 2

The data are Fashion-MNIST where Debian's package dataset-fashion-mnist is installed, else scikit-learn's digits. Here
every process loads them all and trains the clients that it hosts; a real site would have those of its own clients alone
(`hosts`). With --checkpoint FILE the server goes on after a restart, and so do sites that wait for it by TCP.
"""

import argparse
import hashlib

import torch
from torch import nn

from distopt import federated
from distopt.cli.datasets import load

parser = argparse.ArgumentParser()
parser.add_argument("--rounds", type=int, default=100)
parser.add_argument("--data", help="digits, fashion-mnist or a folder of IDX files")
parser.add_argument("--listen", help="host:port to serve at")
parser.add_argument("--server", help="host:port of the server")
parser.add_argument("--sites", type=int, help="how many sites there are, by TCP")
parser.add_argument("--rank", type=int, help="which of them this one is, from 1")
parser.add_argument("--checkpoint", help="file of the server's state")
options = parser.parse_args()

data = load(options.data)
images, labels = data.train_images.flatten(1), data.train_labels
clients = federated.ClientData.split((images, labels), federated.DirichletPartition(alpha=0.1), num_clients=100)
chances = federated.correlated_probabilities(federated.label_distributions(clients.parts, labels), mean=0.1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(images.shape[1], 64), nn.ReLU(), nn.Linear(64, 10))


def evaluate(model):
    return {"accuracy": (model(data.test_images.flatten(1)).argmax(1) == data.test_labels).double().mean()}


common = {
    "model": model,
    "clients": clients,
    "algorithm": federated.FedAU(cutoff=50),
    "local": federated.LocalTraining(steps=5, batch_size=16, lr=0.1),
    "seed": 0,
}
server = {
    "participation": federated.Bernoulli(probability=tuple(chances)),
    "evaluate": evaluate,
    "evaluate_every": 10,
    "checkpoint": options.checkpoint,
    "checkpoint_every": 10 if options.checkpoint else 0,
}

rank = federated.launched_rank()
if options.server or rank:
    print(federated.take_part(**common, server=options.server, sites=options.sites, rank=options.rank))
else:
    if options.listen or rank == 0:
        history = federated.serve(rounds=options.rounds, **common, **server, listen=options.listen, sites=options.sites)
    else:
        history = federated.Simulation(**common, **server, mode="loop").run(options.rounds)
    bits = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy().tobytes()
    print(
        f"test accuracy {history.last('accuracy'):.4%} after {options.rounds} rounds, model "
        f"{hashlib.sha256(bits).hexdigest()[:16]}"
    )
