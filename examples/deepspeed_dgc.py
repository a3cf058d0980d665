"""An ordinary DeepSpeed training script that sends 0.1% of each gradient: one other import, and a block of ds_config.

    RANKS=2 launch/deepspeed.sh examples/deepspeed_dgc.py --deepspeed_config launch/deepspeed/dgc.json
    torchrun --standalone --nproc-per-node 2 examples/deepspeed_dgc.py --deepspeed_config launch/deepspeed/dgc.json

Trains a small network on scikit-learn's handwritten digits (pip install scikit-learn), evaluates after each epoch and
saves a checkpoint. Start it again with the same --checkpoints, and it goes on where it stopped. The other files in
launch/deepspeed send a hundredth of the gradient beneath Adam, and train in bf16 with DDP inside the engine.
"""

import argparse
import os

import deepspeed
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from distopt.integrations.deepspeed import initialize  # <- distopt, in place of deepspeed.initialize


def load_data():
    pixels, labels = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(pixels).float() / 16, torch.from_numpy(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1440], order[1440:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def to_engine(engine, images, labels):
    dtype = next(engine.module.parameters()).dtype
    return images.to(engine.device, dtype), labels.to(engine.device)


def evaluate(engine, test_set):
    """Test accuracy; each rank judges its share, and all get the sum."""
    images, labels = to_engine(engine, *test_set[dist.get_rank() :: dist.get_world_size()])
    with torch.no_grad():
        correct = (engine(images).argmax(1) == labels).sum()
    dist.all_reduce(correct)
    return correct.item() / len(test_set)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--checkpoints", default="runs/deepspeed_dgc", help="folder to save to and resume from")
    parser.add_argument("--local_rank", type=int, default=int(os.environ.get("LOCAL_RANK", 0)))  # of the launcher
    args = deepspeed.add_config_arguments(parser).parse_args()

    if os.environ.get("DS_ACCELERATOR") == "cpu":  # one host talks over gloo: its own kernel takes minutes to compile
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.manual_seed(0)
    train_set, test_set = load_data()
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    engine, _, loader, _ = initialize(
        args, model=model, model_parameters=model.parameters(), training_data=train_set
    )  # the block "distopt" of the ds_config is read here
    engine.load_checkpoint(args.checkpoints)
    steps_per_epoch = len(loader) // engine.gradient_accumulation_steps()
    for epoch in range(engine.global_steps // steps_per_epoch, args.epochs):
        loader.data_sampler.set_epoch(epoch)
        for images, labels in loader:
            images, labels = to_engine(engine, images, labels)
            engine.backward(nn.functional.cross_entropy(engine(images).float(), labels))
            engine.step()
        accuracy = evaluate(engine, test_set)
        engine.save_checkpoint(args.checkpoints)
        if dist.get_rank() == 0:
            stats = engine.distopt.stats()
            saving = stats["bytes_dense"] / stats["bytes_sent"]
            print(f"epoch {epoch + 1}: accuracy {accuracy:.1%}, {saving:.0f}x fewer bytes than dense", flush=True)
    engine.distopt.detach()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
