"""Exact full-batch steps that do not wait for the slowest workers: gradient coding, with stragglers for show.

    torchrun --standalone --nproc-per-node 5 examples/coded_training.py --stragglers rotating
    mpirun -n 5 --oversubscribe python examples/coded_training.py --stragglers rotating

Trains a small network on scikit-learn's handwritten digits (pip install scikit-learn): rank 0 decodes, the other ranks
compute. `--tolerate 0` waits for all of them, for comparison. Prints a report at the end and, with --plot and --record,
leaves a plot of the arrivals and a trace for `distopt plan-code`.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn

import distopt


def load_data():
    pixels, labels = load_digits(return_X_y=True)
    return torch.from_numpy(pixels).reshape(-1, 64) / 16, torch.from_numpy(labels)


def build_model(width):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, 10)).double()


def straggle(kind, worker, num_workers, step):
    """Makes this worker slow, or not. At any time at most one rotating sleeper sleeps."""
    kind, _, value = kind.partition(":")
    if kind == "rotating":
        sleep_s = float(value or 0.5)
        turn, passed = divmod(time.time(), sleep_s)
        if int(turn) % num_workers == worker:
            time.sleep(sleep_s - passed)
    elif kind == "heavy-tailed":
        time.sleep(min(5.0, float(value or 0.005) * random.Random(step * 1000 + worker).paretovariate(1.5)))
    elif kind == "dead" and worker == num_workers - 1 and step >= int(value or 10):
        os.kill(os.getpid(), signal.SIGKILL)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=None, help="samples per step; default: all 1,797")
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--width", type=int, default=256, help="of the hidden layer")
    parser.add_argument("--tolerate", type=int, default=1, help="how many slow workers no step waits for")
    parser.add_argument("--code", default="auto", help="a name in distopt.coding.CODES")
    parser.add_argument("--decoder", default="first", choices=("first", "sharded"), help="who decodes")
    parser.add_argument("--config", help="in place of these: a configuration in JSON, as distopt plan-code prints it")
    parser.add_argument("--deadline", type=float, default=60.0, help="seconds that one step may take")
    parser.add_argument(
        "--stragglers",
        default="none",
        help="none, rotating[:SECONDS] (one worker after the other sleeps), heavy-tailed[:SECONDS] (Pareto), or "
        "dead[:STEP] (the last worker is killed; start it by launch/torchrun_survivors.sh or launch/mpirun.sh then)",
    )
    parser.add_argument("--plot", type=Path, help="PNG of when each answer came")
    parser.add_argument("--record", type=Path, help="CSV or JSON with the time of each answer, for distopt plan-code")
    parser.add_argument("--save", type=Path, help="where rank 0 saves the final parameters")
    args = parser.parse_args()

    torch.set_num_threads(1)
    if "MASTER_ADDR" in os.environ:  # torchrun; under mpirun distopt uses MPI
        dist.init_process_group("gloo")
    pixels, labels = load_data()
    model = build_model(args.width)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9)
    batches = distopt.coding.Batches(len(labels), args.batch_size)
    coding = distopt.GradientCoding(
        code=args.code, stragglers=args.tolerate, master=args.decoder, deadline_s=args.deadline
    )
    if args.config:
        coding = distopt.from_config(json.loads(args.config))

    began = time.monotonic()
    with coding.attach(model, optimizer, batches=batches) as coded:  # <- distopt
        for step in coded.steps(args.steps):
            if coded.worker is not None:
                straggle(args.stragglers, coded.worker, coded.num_workers, step)
            loss = coded.backward(  # <- distopt, in place of loss.backward()
                lambda part: nn.functional.cross_entropy(
                    model(pixels[part.samples]), labels[part.samples], reduction="sum"
                )
            )
            optimizer.step()
            if coded.rank == 0 and loss is not None and step % 20 == 19:
                print(f"step {step + 1}: loss {loss:.4f}", flush=True)
        seconds = time.monotonic() - began
        if coded.rank == 0:
            print(coded.report())
            print(f"{args.steps} steps in {seconds:.2f} s")
            if args.plot:
                coded.plot_arrivals(args.plot)
            if args.record:
                coded.trace().save(args.record)
            if args.save:
                torch.save(model.state_dict(), args.save)
    with contextlib.suppress(ValueError, AssertionError):
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
