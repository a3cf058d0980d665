"""A language model on any text, trained by DDP with 0.1% of each gradient: the same loop, dense or compressed.

    torchrun --standalone --nproc-per-node 2 examples/lm_dgc.py --text FILE
    torchrun --standalone --nproc-per-node 2 examples/lm_dgc.py --algorithm dense

An LSTM learns to predict the next character (byte) of the text and reports its perplexity on the last part of the text,
which it does not train on: 1 is certainty, the number of different characters is guessing. Without --text it reads the
King James Bible from Debian's package bible-kjv (apt-get install bible-kjv); nothing is downloaded.

What is particular to recurrent models: their gradients explode now and then and are clipped. DGC clips them on each
rank, before it accumulates them (clip=), where one outlier would otherwise stay for long. The threshold should stop
outliers only: a rank's gradient is noisier than the average, so a tight one binds here where it never would on that.

What is particular to 0.1%: an entry waits a thousand steps on average, and the weights move on meanwhile. Many small
steps make that cheaper than few large ones on the same text.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distopt

CHARACTERS = 16  # that the gradient flows back through: more, smaller steps on the same text suit a sparse gradient
HELD_OUT = 0.05  # of the text, at its end
BIBLE = ("bible", "-f", "gen1:1-rev22:21")


def read_text(path):
    """The text as bytes; the Bible's without the chapter and verse in front of each line."""
    if path is not None:
        text = path.read_bytes()
    elif shutil.which(BIBLE[0]):
        lines = subprocess.run(BIBLE, stdin=subprocess.DEVNULL, capture_output=True, check=True).stdout.splitlines()
        text = b"\n".join(line.partition(b" ")[2] for line in lines)
    else:
        sys.exit("no text: give one with --text FILE, a few hundred kB of anything, or apt-get install bible-kjv")
    if len(text) < 10_000:
        sys.exit(f"the text must have 10,000 characters or more, got {len(text):,}; give a longer one with --text FILE")
    return text


def load_text(path):
    """Training part and held-out part as numbers of characters, and how many different characters there are."""
    seen, characters = torch.frombuffer(bytearray(read_text(path)), dtype=torch.uint8).unique(return_inverse=True)
    border = int(len(characters) * (1 - HELD_OUT))
    return characters[:border], characters[border:], len(seen)


class LanguageModel(nn.Module):
    def __init__(self, num_characters, embedding=64, hidden=96):
        super().__init__()
        self.embedding = nn.Embedding(num_characters, embedding)
        self.lstm = nn.LSTM(embedding, hidden, batch_first=True)
        self.head = nn.Linear(hidden, num_characters)

    def forward(self, characters, state=None):
        """Scores of the next character, shape (batch, length, num_characters), and the state to go on from."""
        output, state = self.lstm(self.embedding(characters), state)
        return self.head(output), state


def batches(text, batch_size, num_characters=CHARACTERS):
    """Endless (characters, next characters), of shape (batch_size, num_characters), and whether the text begins anew.

    The text lies in one column per sequence of all ranks, so that each batch goes on where the one before it ended.
    """
    length = len(text) // (batch_size * dist.get_world_size())
    columns = text[: length * batch_size * dist.get_world_size()].view(-1, length)
    mine = columns[dist.get_rank() * batch_size :][:batch_size]
    while True:
        for start in range(0, length - num_characters, num_characters):
            window = mine[:, start : start + num_characters + 1]
            yield window[:, :-1], window[:, 1:], start == 0


def perplexity(model, text):
    """exp of the mean loss per character; each rank reads its share of the text, and all get the mean."""
    share = text.tensor_split(dist.get_world_size())[dist.get_rank()]
    length = min(1000, len(share) - 1)
    windows = share.unfold(0, length + 1, length)
    with torch.no_grad():
        losses = [loss_of(model(some[:, :-1])[0], some[:, 1:]) * len(some) for some in windows.split(32)]
    total = torch.tensor([sum(losses), len(windows)])
    dist.all_reduce(total)
    return math.exp(total[0] / total[1])


def loss_of(scores, truth):
    return nn.functional.cross_entropy(scores.flatten(0, 1), truth.flatten())


def algorithm_from(options):
    # eight densities from 46% down to 0.2%, each for 2.5% of the steps: the longer and the finer, the gentler
    warmup = distopt.ddp.ExponentialWarmup(stages=8, stage=max(1, round(0.025 * options.steps)))
    if options.algorithm == "dgc":
        # masking would take the momentum of entries that are sent every few steps, as most are early in warm-up
        return distopt.DGC(density=options.density, warmup=warmup, clip=options.clip, masking=False)
    if options.algorithm == "topk":
        return distopt.TopK(density=options.density, warmup=warmup)
    return distopt.Dense()


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="file to learn; default: the King James Bible, if it is installed")
    parser.add_argument("--algorithm", choices=("dense", "topk", "dgc"), default="dgc")
    parser.add_argument("--density", type=float, default=0.001, help="part of the gradient that is sent")
    parser.add_argument("--steps", type=int, default=24000)
    parser.add_argument("--batch-size", type=int, default=8, help=f"sequences of {CHARACTERS} per rank and step")
    parser.add_argument("--hidden", type=int, default=96, help="width of the LSTM")
    parser.add_argument("--lr", type=float, default=0.5, help="at the start; falls to 0 along a cosine")
    parser.add_argument("--clip", type=float, default=2.0, help="largest norm of the whole gradient: for outliers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


def main():
    options = parse_arguments()
    train_text, held_out, num_characters = load_text(options.text)
    dist.init_process_group("gloo")
    torch.manual_seed(options.seed)
    if len(train_text) // (options.batch_size * dist.get_world_size()) <= CHARACTERS:
        sys.exit(f"{len(train_text):,} characters are too few for {dist.get_world_size()} ranks; lower --batch-size")

    model = DistributedDataParallel(LanguageModel(num_characters, hidden=options.hidden))
    optimizer = torch.optim.SGD(model.parameters(), options.lr, momentum=0.9, nesterov=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    attachment = algorithm_from(options).attach(model, optimizer)  # <- distopt

    curve, state = [], None
    stream = batches(train_text, options.batch_size)
    for step in range(1, options.steps + 1):
        characters, following, begins = next(stream)
        state = tuple(part.detach() for part in state) if state and not begins else None
        optimizer.zero_grad()
        scores, state = model(characters, state)
        loss_of(scores, following).backward()
        if options.algorithm != "dgc":  # which has clipped already, on each rank
            nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        scheduler.step()
        if step % max(1, options.steps // 6) == 0 or step == options.steps:
            stats = attachment.stats()
            saving = stats["bytes_dense"] / stats["bytes_sent"]
            curve.append({"step": step, "perplexity": perplexity(model.module, held_out), "saving": saving})
            if dist.get_rank() == 0:
                print(
                    f"step {step}: perplexity {curve[-1]['perplexity']:.3f}, {saving:.0f}x fewer bytes than dense",
                    flush=True,
                )
    if options.json and dist.get_rank() == 0:
        last = attachment.stats()["last"]
        figures = {
            "curve": curve,
            "perplexity": curve[-1]["perplexity"],
            "saving": curve[-1]["saving"],
            "saving_after_warmup": last["bytes_dense"] / last["bytes_sent"],
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "options": {name: value for name, value in vars(options).items() if not isinstance(value, Path)},
        }
        options.json.write_text(json.dumps(figures) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
