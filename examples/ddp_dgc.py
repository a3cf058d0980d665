"""An ordinary DDP training script that sends 0.1% of each gradient. The one line that does it is marked.

    torchrun --standalone --nproc-per-node 2 examples/ddp_dgc.py

Trains a small network on scikit-learn's handwritten digits (pip install scikit-learn), evaluates after each epoch and
saves a checkpoint. Start it again with the same --checkpoints, also with another number of ranks, and it goes on where
it stopped. launch/elastic.sh starts it so that torchrun does this by itself after a worker died.
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


def save(folder, epoch, parts, attachment):
    """Rank 0 saves what all ranks share; every rank saves what DGC holds back, which differs by rank."""
    here = folder / f"epoch-{epoch}"
    distopt.checkpoint.save(attachment, here)
    if dist.get_rank() == 0:
        torch.save({name: part.state_dict() for name, part in parts.items()}, here / "shared.pt")
    dist.barrier()  # the checkpoint is complete
    if dist.get_rank() == 0:
        (folder / "latest.new").write_text(str(epoch))
        (folder / "latest.new").replace(folder / "latest")  # in one step: a crash leaves the old epoch or the new one


def resume(folder, parts, attachment):
    """Loads the newest complete checkpoint, also one of another number of ranks; returns how many epochs are done."""
    if not (folder / "latest").exists():
        return 0
    epoch = int((folder / "latest").read_text())
    here = folder / f"epoch-{epoch}"
    for name, state in torch.load(here / "shared.pt", map_location="cpu").items():
        parts[name].load_state_dict(state)
    distopt.checkpoint.load(attachment, here)
    return epoch


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32, help="images per rank and step")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--density", type=float, default=0.001, help="part of the gradient that is sent")
    parser.add_argument(
        "--checkpoints", type=Path, default=Path("runs/ddp_dgc"), help="folder to save to and resume from"
    )
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
    attachment = distopt.DGC(density=args.density, warmup=warmup).attach(model, optimizer)  # <- distopt

    args.checkpoints.mkdir(parents=True, exist_ok=True)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    for epoch in range(resume(args.checkpoints, parts, attachment), args.epochs):
        sampler.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images.to(device)), labels.to(device)).backward()
            optimizer.step()
        scheduler.step()
        accuracy = evaluate(model.module, test_set, device)
        save(args.checkpoints, epoch + 1, parts, attachment)
        if dist.get_rank() == 0:
            stats = attachment.stats()
            saving = stats["bytes_dense"] / stats["bytes_sent"]
            print(f"epoch {epoch + 1}: accuracy {accuracy:.1%}, {saving:.0f}x fewer bytes than dense", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
