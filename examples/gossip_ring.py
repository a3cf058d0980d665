"""An ordinary training script whose ranks average with their neighbours only. The one line that does it is marked.

    torchrun --standalone --nproc-per-node 4 examples/gossip_ring.py
    torchrun --standalone --nproc-per-node 4 examples/gossip_ring.py --topology torus --exchange overlapped
    torchrun --standalone --nproc-per-node 4 examples/gossip_ring.py --initial same --every 4 --logdir runs/gossip

or without torchrun, whose agent ends all ranks with the first that dies, while gossip goes on: on each rank's machine

    MASTER_ADDR=192.0.2.1 MASTER_PORT=29500 WORLD_SIZE=4 RANK=0 python examples/gossip_ring.py     # and RANK=1 to 3

Each rank starts from weights of its own (--initial same: all from the same) and sees its own part of the images:
Fashion-MNIST where Debian's package dataset-fashion-mnist is installed, else scikit-learn's digits. With --checkpoints
FOLDER it goes on where it stopped. With --non-iid ALPHA ranks have different labels, the smaller the more so.
"""

import argparse
import contextlib
import hashlib
import math
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import distopt
from distopt.cli.datasets import load
from distopt.federated import DirichletPartition, IIDPartition
from distopt.gossip import NodeBatches, TensorBoard

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", help="digits, fashion-mnist or a folder of IDX files")
parser.add_argument("--steps", type=int, default=500)
parser.add_argument("--batch-size", type=int, default=32, help="images per rank and step")
parser.add_argument("--lr", type=float, default=0.01)
parser.add_argument("--topology", default="ring", help="distopt topology --ranks 4 lists and compares them")
parser.add_argument("--mixing", default="d-psgd", help="d-psgd, push-sum, choco, quasi-global-momentum, noloco, ...")
parser.add_argument("--correction", default="auto", choices=["off", "on", "auto"], help="of the averages' variance")
parser.add_argument("--every", type=int, default=1, help="steps from one exchange to the next")
parser.add_argument("--exchange", default="synchronous", choices=["synchronous", "overlapped", "asynchronous"])
parser.add_argument("--initial", choices=["different", "same"], help="weights; default: different if corrected")
parser.add_argument("--non-iid", type=float, metavar="ALPHA", help="labels by a Dirichlet distribution: 0.1 is harsh")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--look-every", type=int, default=50, help="steps between two evaluations and checkpoints")
parser.add_argument("--checkpoints", type=Path, help="folder to save to and resume from")
parser.add_argument("--logdir", type=Path, help="folder of events for TensorBoard")
options = parser.parse_args()

dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
data = load(options.data)
partition = IIDPartition() if options.non_iid is None else DirichletPartition(alpha=options.non_iid, sizes="equal")
parts = partition.split(data.train_labels, ranks, options.seed)
batches = NodeBatches((data.train_images, data.train_labels), parts, options.batch_size, options.seed)

gossip = distopt.Gossip(
    topology=options.topology, mixing=options.mixing, correction=options.correction, every=options.every,
    exchange=options.exchange,
)  # fmt: skip
initial = options.initial or ("different" if gossip.corrects else "same")
torch.manual_seed(options.seed + (rank if initial == "different" else 0))
width = data.train_images[0].numel()
model = nn.Sequential(
    nn.Flatten(), nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, data.num_classes)
)
momentum = 0.0 if options.mixing in ("quasi-global-momentum", "gradient-tracking") else 0.9  # which have their own
optimizer = torch.optim.SGD(model.parameters(), options.lr, momentum=momentum, weight_decay=1e-4)
job = distopt.Job(algorithm=gossip)
if options.checkpoints is not None:
    kept = distopt.job.CheckpointSettings(folder=str(options.checkpoints), every=options.look_every)
    job = distopt.Job(algorithm=gossip, checkpoint=kept)
run = job.attach(model, optimizer)  # <- distopt; goes on from the newest checkpoint
attached = run.attachment


def accuracy():
    with torch.no_grad():
        return (model(data.test_images).argmax(1) == data.test_labels).double().mean().item()


def distance():
    try:
        return attached.consensus_distance()
    except distopt.PeerLostError:  # a rank has gone just now; the others go on
        return math.nan


with contextlib.ExitStack() as stack:
    board = None if options.logdir is None else stack.enter_context(TensorBoard(options.logdir / f"rank-{rank}"))
    for step in run.steps(options.steps):
        images, labels = batches.of(rank, step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        if (step + 1) % options.look_every == 0 or step + 1 == options.steps:
            away, found = distance(), accuracy()
            if board is not None:
                board.record(attached, accuracy=found, loss=loss.item())
            if rank == 0:
                print(f"step {step + 1}: accuracy {found:.1%}, consensus distance {away:.3g}", flush=True)

stats = attached.stats()
run.close()
bits = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy().tobytes()
print(
    f"rank {rank}: test accuracy {accuracy():.2%} after {options.steps} steps, {stats['exchanges']} exchanges, "
    f"{stats['bytes_sent'] / 1e6:.2f} MB sent, model {hashlib.sha256(bits).hexdigest()[:16]}",
    flush=True,
)
dist.destroy_process_group()
