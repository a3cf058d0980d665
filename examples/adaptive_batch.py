"""An ordinary DDP training script whose batch grows when the gradient noise says so. The lines that do it are marked.

    torchrun --standalone --nproc-per-node 2 examples/adaptive_batch.py
    torchrun --standalone --nproc-per-node 2 examples/adaptive_batch.py --test augmented --density 0.05
    torchrun --standalone --nproc-per-node 2 examples/adaptive_batch.py --fixed     # for comparison

Trains a small network, by default on scikit-learn's handwritten digits. The learning rate falls linearly with the
samples that are done, not with the steps, of which nobody knows the number beforehand; AdaScale's rule makes it larger
while the batch grows. With --density only a part of each gradient is sent (DGC); the noise is measured all the same.
"""

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import distopt
from distopt.batch import AdaScale, GrowingBatchSampler, LinearDecay
from distopt.cli.datasets import load


def build_model(data):
    _, height, width = data.shape
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(16 * (height // 2) * (width // 2), 64), nn.ReLU(), nn.Linear(64, data.num_classes),
    )  # fmt: skip


def accuracy(model, data):
    """On the test set; each rank judges its share, and all get the sum."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    with torch.no_grad():
        correct = (model(data.test_images[rank::ranks]).argmax(1) == data.test_labels[rank::ranks]).sum()
    dist.all_reduce(correct)
    return correct.item() / len(data.test_labels)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, fashion-mnist or a folder of IDX files")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=8, help="images per rank and step at the start")
    parser.add_argument("--max-batch", type=int, default=512, help="images per step over all ranks, at most")
    parser.add_argument("--test", default="norm", choices=["norm", "augmented", "coordinate"])
    parser.add_argument("--eta", type=float, default=0.5, help="noise against signal; smaller grows sooner")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--density", type=float, help="part of the gradient that is sent; left out: all of it")
    parser.add_argument("--fixed", action="store_true", help="the batch stays as it is at the start")
    args = parser.parse_args()

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    data = load(args.data)
    train_set = TensorDataset(data.train_images, data.train_labels)
    sampler = GrowingBatchSampler(train_set, batch_size=args.batch_size)  # <- distopt
    loader = DataLoader(train_set, batch_sampler=sampler)

    model = DistributedDataParallel(build_model(data))
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9)
    scheduler = LinearDecay(optimizer, args.epochs * len(train_set))  # in samples
    sent = distopt.Dense() if args.density is None else distopt.DGC(density=args.density)
    attachment = sent.attach(model, optimizer)
    largest = sampler.batch_size if args.fixed else args.max_batch
    growing = distopt.AdaptiveBatch(test=args.test, eta=args.eta, max_batch=largest, learning_rate=AdaScale(cap=4.0))
    with growing.attach(model, optimizer, loader, beside=attachment) as batch:  # <- distopt
        for epoch in range(args.epochs):
            for micro_batches in batch.steps():  # <- distopt
                for images, labels in micro_batches:
                    loss = nn.functional.cross_entropy(model(images), labels)
                    batch.backward(loss)  # <- distopt, in place of loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                scheduler.advance_to(batch.stats()["samples"])
            reached = accuracy(model.module, data)
            if dist.get_rank() == 0:
                stats, noise = batch.stats(), batch.noise_scale
                print(
                    f"epoch {epoch + 1}: accuracy {reached:.1%}, {stats['steps']} rounds, "
                    f"{stats['batch_size']} images a step, "
                    f"noise scale {'unknown' if noise is None else f'{noise:.0f}'}",
                    flush=True,
                )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
