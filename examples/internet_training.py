"""A small language model, trained by machines that a slow link joins: 15 steps alone, then one small message to each.

    torchrun --standalone --nproc-per-node 2 examples/internet_training.py
    torchrun --standalone --nproc-per-node 2 examples/internet_training.py --algorithm diloco --overlap 10

or without torchrun, whose agent ends all ranks with the first that dies, while the others could go on: on each machine

    MASTER_ADDR=192.0.2.1 MASTER_PORT=29500 WORLD_SIZE=2 RANK=0 python examples/internet_training.py     # and RANK=1
    python examples/internet_training.py --join 192.0.2.1:43210    # later, one more: an address that a rank prints

A transformer learns to predict the next character (byte) of a text, and says its loss on the last part of it, which it
does not train on. Without --text it reads Python's own documentation, which every Python brings along. Which
--inner-steps and --overlap suit a link is what `distopt link --step-seconds` says; docs/local.md has the whole story.
"""

import argparse
import math
import pydoc_data.topics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

import distopt

LENGTH = 64  # characters in a sequence
HELD_OUT = 0.05  # of the text, at its end


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.combine = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        batch, length, width = x.shape
        split = self.attend(self.norm_1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(*split, is_causal=True)
        x = x + self.combine(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm_2(x))


class Transformer(nn.Module):
    """Scores of the next character, shape (batch, length, num_characters), from characters of shape (batch, length)."""

    def __init__(self, num_characters, width=128, layers=2, heads=4):
        super().__init__()
        self.characters, self.places = nn.Embedding(num_characters, width), nn.Embedding(LENGTH, width)
        for embedding in (self.characters, self.places):
            nn.init.normal_(embedding.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_characters)

    def forward(self, characters):
        return self.head(self.norm(self.blocks(self.characters(characters) + self.places.weight)))


def load_text(path):
    """The text as bytes."""
    text = "\n".join(pydoc_data.topics.topics.values()).encode() if path is None else path.read_bytes()
    if len(text) < 10_000:
        sys.exit(f"the text must have 10,000 characters or more, got {len(text):,}; give a longer one with --text FILE")
    return text


def numbered(text):
    """Training part and held-out part as numbers of characters, and how many different characters there are."""
    seen, characters = torch.frombuffer(bytearray(text), dtype=torch.uint8).unique(return_inverse=True)
    border = int(len(characters) * (1 - HELD_OUT))
    return characters[:border], characters[border:], len(seen)


def windows(text, size, seed):
    """Sequences from places in the text that the seed draws, with the character that follows: (size, LENGTH + 1)."""
    starts = torch.randint(len(text) - LENGTH, (size,), generator=torch.Generator().manual_seed(seed))
    return text[starts[:, None] + torch.arange(LENGTH + 1)]


def loss_of(model, sequences):
    scores = model(sequences[:, :-1])
    return functional.cross_entropy(scores.flatten(0, 1), sequences[:, 1:].flatten())


@torch.no_grad()
def loss_on(model, text, most=256):
    """The mean loss per character on sequences from the whole of the text, at most so many."""
    sequences = text.unfold(0, LENGTH + 1, max(LENGTH, len(text) // most))[:most]
    parts = [(loss_of(model, part).item(), len(part)) for part in sequences.split(64)]
    return sum(loss * count for loss, count in parts) / sum(count for _, count in parts)


def learning_rate(step, steps, warmup=20):
    """A part of the highest: a rise, then a cosine down to a tenth."""
    return min(1.0, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * min(step / steps, 1.0)))


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="file to learn; default: Python's own documentation")
    parser.add_argument("--algorithm", choices=("sparseloco", "diloco"), default="sparseloco")
    parser.add_argument("--inner-steps", type=int, default=15, help="steps from one exchange to the next")
    parser.add_argument("--warmup-rounds", type=int, default=5, help="rounds in which that number grows from 1")
    parser.add_argument("--overlap", type=int, default=0, help="steps that an exchange may take behind the computation")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=8, help=f"sequences of {LENGTH} per rank and step")
    parser.add_argument("--lr", type=float, default=2e-3, help="the highest; it rises at first and then falls")
    parser.add_argument("--join", metavar="ADDRESS", help="come later, to a rank that is at work")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main():
    options = parse_arguments()
    text, held_out, num_characters = numbered(load_text(options.text))
    torch.manual_seed(options.seed)
    model = Transformer(num_characters)
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, betas=(0.9, 0.95), weight_decay=0.1)
    algorithm = {"sparseloco": distopt.SparseLoCo, "diloco": distopt.DiLoCo}[options.algorithm](
        inner_steps=options.inner_steps, warmup_rounds=options.warmup_rounds, overlap=options.overlap
    )
    if options.join is None:
        dist.init_process_group("gloo")
    attached = algorithm.attach(model, optimizer, join=options.join)  # <- distopt
    print(f"rank {attached.rank} works at {attached.address}", flush=True)

    began = time.perf_counter()
    for step in range(attached.step, options.steps):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * learning_rate(step, options.steps)
        sequences = windows(text, options.batch_size, seed=(1000 * options.seed + attached.rank) * 1_000_000 + step)
        optimizer.zero_grad()
        loss_of(model, sequences).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()  # and after the last one of a round the exchange
        if (step + 1) % 50 == 0 and attached.rank == 0:
            print(f"step {step + 1}: held-out loss {loss_on(model, held_out):.3f}", flush=True)
    attached.flush()  # takes in what is under way
    seconds = time.perf_counter() - began

    stats = attached.stats()
    print(
        f"rank {attached.rank}: held-out loss {loss_on(model, held_out):.3f} after {options.steps} steps and "
        f"{stats['exchanges']} exchanges, {stats['bytes_sent'] / 1e3:,.0f} kB instead of "
        f"{stats['bytes_dense'] / 1e3:,.0f}, {stats['seconds_exchanging'] / seconds:.1%} of {seconds:.1f} s in "
        f"exchanges, {len(stats['members'])} ranks",
        flush=True,
    )
    attached.detach()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
