"""An ordinary script with Hugging Face's Trainer that sends 0.1% of each gradient. Lines that do it end in `# distopt`.

    torchrun --standalone --nproc-per-node 2 examples/trainer_dgc.py

Trains a small network on scikit-learn's handwritten digits and saves a checkpoint after each epoch, with what each rank
holds back in it. Start it again with the same --checkpoints and it goes on, also with another number of ranks.
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from distopt.integrations.transformers import DistoptCallback  # distopt


def load_data():
    pixels, labels = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(pixels).float() / 16, torch.from_numpy(labels)
    rows = [{"pixels": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    return rows[:1440], rows[1440:]


class Digits(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, pixels, labels):
        scores = self.model(pixels)
        return {"loss": nn.functional.cross_entropy(scores, labels), "logits": scores}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--checkpoints", type=Path, default=Path("runs/trainer_dgc"))
    parser.add_argument("--job", default={"algorithm": "dgc", "density": 0.001}, help="a distopt.toml")  # distopt
    args = parser.parse_args()

    torch.manual_seed(0)
    train_set, test_set = load_data()
    arguments = TrainingArguments(
        output_dir=str(args.checkpoints),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=32,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,  # distopt
        save_strategy="epoch",
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        use_cpu=not torch.cuda.is_available(),
    )
    model = Digits()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=train_set,
        eval_dataset=test_set,
        optimizers=(optimizer, None),
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(1) == found.label_ids).mean())},
    )
    compression = DistoptCallback(trainer, args.job)  # distopt
    trainer.add_callback(compression)  # distopt
    last = get_last_checkpoint(str(args.checkpoints)) if args.checkpoints.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    accuracy = trainer.evaluate()["eval_accuracy"]
    if trainer.is_world_process_zero():
        print(f"epoch {args.epochs}: accuracy {accuracy:.1%}")
        stats = compression.stats()  # distopt
        print(f"{stats['bytes_dense'] / max(stats['bytes_sent'], 1):.0f}x fewer bytes than dense")  # distopt


if __name__ == "__main__":
    main()
