"""An ordinary Lightning script that sends 0.1% of each gradient. The lines that do it end in `# distopt`.

    torchrun --standalone --nproc-per-node 2 examples/lightning_dgc.py

Trains a small network on scikit-learn's handwritten digits and saves one file after each epoch, with what all ranks
hold back in it. Start it again with the same --checkpoints and it goes on, also with another number of ranks.
"""

import argparse
import os
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from distopt.integrations.lightning import DistoptCallback  # distopt


def load_data():
    pixels, labels = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(pixels).float() / 16, torch.from_numpy(labels)
    return TensorDataset(images[:1440], labels[:1440]), TensorDataset(images[1440:], labels[1440:])


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch, index):
        right = (self.model(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("accuracy", right, sync_dist=True)

    def on_validation_epoch_end(self):
        accuracy = self.trainer.callback_metrics["accuracy"]
        self.print(f"epoch {self.current_epoch + 1}: accuracy {accuracy:.1%}")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--checkpoints", type=Path, default=Path("runs/lightning_dgc"))
    parser.add_argument("--job", default={"algorithm": "dgc", "density": 0.001}, help="a distopt.toml")  # distopt
    args = parser.parse_args()

    lightning.seed_everything(0)
    train_set, test_set = load_data()
    callbacks = [ModelCheckpoint(args.checkpoints, filename="epoch", save_last=True)]
    compression = DistoptCallback(args.job)  # distopt
    callbacks.append(compression)  # distopt
    trainer = lightning.Trainer(
        devices=int(os.environ["LOCAL_WORLD_SIZE"]), num_nodes=int(os.environ["GROUP_WORLD_SIZE"]), strategy="ddp",
        max_epochs=args.epochs, callbacks=callbacks, logger=False, enable_progress_bar=False, num_sanity_val_steps=0,
    )  # fmt: skip
    last = args.checkpoints / "last.ckpt"
    trainer.fit(
        Digits(),
        DataLoader(train_set, 32, shuffle=True),
        DataLoader(test_set, 357),
        ckpt_path=last if last.exists() else None,
    )
    if trainer.is_global_zero:  # distopt
        stats = compression.stats()  # distopt
        print(f"{stats['bytes_dense'] / max(stats['bytes_sent'], 1):.0f}x fewer bytes than dense")  # distopt


if __name__ == "__main__":
    main()
