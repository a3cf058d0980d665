"""An ordinary Accelerate script that sends 0.1% of each gradient. The lines that do it end in `# distopt`.

    torchrun --standalone --nproc-per-node 2 examples/accelerate_dgc.py

Trains a small network on scikit-learn's handwritten digits and saves Accelerate's state after each epoch, with what
each rank holds back in it. Start it again with the same --checkpoints: it goes on, also with another number of ranks.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from distopt.integrations.accelerate import attach  # distopt


def load_data():
    pixels, labels = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(pixels).float() / 16, torch.from_numpy(labels)
    return TensorDataset(images[:1440], labels[:1440]), (images[1440:], labels[1440:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--checkpoints", type=Path, default=Path("runs/accelerate_dgc"))
    parser.add_argument("--job", default={"algorithm": "dgc", "density": 0.001}, help="a distopt.toml")  # distopt
    args = parser.parse_args()

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(0)
    train_set, (images, labels) = load_data()
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(train_set, 32, shuffle=True))
    attached = attach(accelerator, model, optimizer, args.job)  # distopt

    done = sorted(args.checkpoints.glob("epoch-*"))
    if done:
        accelerator.load_state(str(done[-1]))
    for epoch in range(len(done), args.epochs):
        for batch, targets in loader:
            accelerator.backward(nn.functional.cross_entropy(model(batch), targets))
            optimizer.step()
            optimizer.zero_grad()
        accelerator.save_state(str(args.checkpoints / f"epoch-{epoch:03d}"))
        with torch.no_grad():
            scores = accelerator.unwrap_model(model)(images.to(accelerator.device))
        accuracy = (scores.argmax(1).cpu() == labels).float().mean().item()
        accelerator.print(f"epoch {epoch + 1}: accuracy {accuracy:.1%}")
    stats = attached.stats()  # distopt
    accelerator.print(f"{stats['bytes_dense'] / max(stats['bytes_sent'], 1):.0f}x fewer bytes than dense")  # distopt
    attached.detach()  # distopt
    accelerator.end_training()


if __name__ == "__main__":
    main()
