"""An ordinary DDP training script that sends 0.1% of each gradient. The one line that does it is marked.

    torchrun --standalone --nproc-per-node 2 examples/ddp_dgc.py

Trains a small network on scikit-learn's handwritten digits (pip install scikit-learn), evaluates after each epoch and
saves a checkpoint. Start it again with the same --checkpoints, also with another number of ranks, and it goes on where
it stopped. launch/elastic.sh starts it so that torchrun does this by itself after a worker died. With --job FILE the
algorithm, the checkpoints and the log are those of that file (distopt job --init distopt.toml writes one).
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import distopt


def load_data():
    pixels, labels = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 16, torch.from_numpy(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1440], order[1440:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def build_model():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def evaluate(model, test_set, device):
    """Test accuracy; each rank judges its share, and all get the sum."""
    images, labels = test_set[dist.get_rank() :: dist.get_world_size()]
    with torch.no_grad():
        correct = (model(images.to(device)).argmax(1) == labels.to(device)).sum()
    dist.all_reduce(correct)
    return correct.item() / len(test_set)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32, help="images per rank and step")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--density", type=float, default=0.001, help="part of the gradient that is sent")
    parser.add_argument(
        "--checkpoints", type=Path, default=Path("runs/ddp_dgc"), help="folder to save to and resume from"
    )
    parser.add_argument("--job", help="distopt.toml, in place of --density and --checkpoints")
    args = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpu else "gloo")
    torch.manual_seed(0)
    train_set, test_set = load_data()
    sampler = DistributedSampler(train_set, drop_last=True)
    loader = DataLoader(train_set, args.batch_size, sampler=sampler, drop_last=True)

    model = DistributedDataParallel(build_model().to(device), device_ids=[device.index] if on_gpu else None)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, nesterov=True, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    warmup = distopt.ddp.PaperWarmup(steps_per_epoch=len(loader))  # 25%, 6%, 1.6%, 0.4%, one epoch each
    job = distopt.Job.load(args.job) if args.job else distopt.Job(
        algorithm=distopt.DGC(density=args.density, warmup=warmup),
        checkpoint=distopt.job.CheckpointSettings(folder=str(args.checkpoints), every=1),
    )  # fmt: skip
    with job.attach(model, optimizer, scheduler=scheduler) as run:  # <- distopt
        for epoch in run.epochs(args.epochs):
            sampler.set_epoch(epoch)
            for images, labels in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images.to(device)), labels.to(device)).backward()
                optimizer.step()
            scheduler.step()
            accuracy = evaluate(model.module, test_set, device)
            run.note(accuracy=accuracy)
            if dist.get_rank() == 0:
                stats = run.stats()
                saving = stats["bytes_dense"] / stats["bytes_sent"]
                print(f"epoch {epoch + 1}: accuracy {accuracy:.1%}, {saving:.0f}x fewer bytes than dense", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
