"""HSDP with 1% of the gradient between replicas: FSDP2 shards the model inside each, distopt sends between them.

    torchrun --standalone --nproc-per-node 4 examples/hsdp_dgc.py

Two replicas of two shards each train a small network on scikit-learn's handwritten digits (pip install scikit-learn).
In a real job the shards of a replica are on the GPUs of one host, and replicas on hosts behind a slow link. The lines
that differ from FSDP2's own HSDP are marked.
"""

import argparse

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from distopt import DGC
from distopt.integrations import fsdp


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--density", type=float, default=0.01, help="part of the gradient that is sent")
    args = parser.parse_args()

    dist.init_process_group("gloo")
    device = "cpu"
    shards = dist.get_world_size() // args.replicas
    mesh = init_device_mesh(device, (args.replicas, shards), mesh_dim_names=("replicate", "shard"))
    pixels, labels = (torch.from_numpy(each) for each in load_digits(return_X_y=True))
    images = pixels.float() / 16

    torch.manual_seed(0)  # replicas begin alike
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh["shard"])  # <- not the whole mesh: FSDP would average between replicas itself
    fully_shard(model, mesh=mesh["shard"])  # <- likewise
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    with fsdp.attach(model, optimizer, DGC(density=args.density), mesh=mesh) as attachment:  # <- distopt
        batches = torch.Generator().manual_seed(dist.get_rank())
        for _ in range(args.steps):
            picked = torch.randint(1440, (32,), generator=batches)
            nn.functional.cross_entropy(model(images[picked]), labels[picked]).backward()
            optimizer.step()
            optimizer.zero_grad()
        stats = attachment.stats()
    with torch.no_grad():
        accuracy = float((model(images[1440:]).argmax(1) == labels[1440:]).float().mean())
    if dist.get_rank() == 0:
        saving = stats["bytes_dense"] / stats["bytes_sent"]
        print(
            f"{args.replicas} replicas of {shards} shards: accuracy {accuracy:.1%}, {saving:.0f}x fewer bytes between"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
