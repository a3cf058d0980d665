"""An ordinary Lightning Fabric script that sends 0.1% of each gradient. The lines that do it end in `# distopt`.

    torchrun --standalone --nproc-per-node 2 examples/fabric_dgc.py

Trains a small network on scikit-learn's handwritten digits and saves one file after each epoch, with what all ranks
hold back in it. Start it again with the same --checkpoints and it goes on, also with another number of ranks.
"""

import argparse
import os
from pathlib import Path

import torch
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from distopt.integrations.fabric import attach  # distopt


def load_data():
    pixels, labels = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(pixels).float() / 16, torch.from_numpy(labels)
    return TensorDataset(images[:1440], labels[:1440]), (images[1440:], labels[1440:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--checkpoints", type=Path, default=Path("runs/fabric_dgc"))
    parser.add_argument("--job", default={"algorithm": "dgc", "density": 0.001}, help="a distopt.toml")  # distopt
    args = parser.parse_args()

    fabric = Fabric(accelerator="auto", devices=int(os.environ["LOCAL_WORLD_SIZE"]), strategy="ddp")
    fabric.launch()
    fabric.seed_everything(0)
    train_set, (images, labels) = load_data()
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    model, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(DataLoader(train_set, 32, shuffle=True))
    attached = attach(fabric, model, optimizer, args.job)  # distopt

    state = {"model": model, "optimizer": optimizer, "epoch": 0}
    state["distopt"] = attached  # distopt
    if (args.checkpoints / "last.pt").exists():
        fabric.load(args.checkpoints / "last.pt", state)
    for epoch in range(state["epoch"], args.epochs):
        for batch, targets in loader:
            fabric.backward(nn.functional.cross_entropy(model(batch), targets))
            optimizer.step()
            optimizer.zero_grad()
        state["epoch"] = epoch + 1
        fabric.save(args.checkpoints / "last.pt", state)
        with torch.no_grad():
            scores = model.module(images.to(fabric.device))
        fabric.print(f"epoch {epoch + 1}: accuracy {(scores.argmax(1).cpu() == labels).float().mean():.1%}")
    stats = attached.stats()  # distopt
    fabric.print(f"{stats['bytes_dense'] / max(stats['bytes_sent'], 1):.0f}x fewer bytes than dense")  # distopt
    attached.detach()  # distopt


if __name__ == "__main__":
    main()
