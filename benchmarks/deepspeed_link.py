"""A step of DeepSpeed with and without the block: time and bytes on the wire, on loopback and between two hosts.

    python benchmarks/deepspeed_link.py --json benchmarks/results/deepspeed_link.json         # loopback
    sudo python benchmarks/deepspeed_link.py --rate 100mbit --json ...                         # and network namespaces

The model is docs/links.md's: an MLP 784-2048-2048-2048-10 (10.0M parameters), 64 samples per rank and step, fp32, SGD
with momentum. Each way trains an engine of its own; the first steps are not measured. Bytes are those that the kernel
has counted on this host's interface per step: between two hosts what one rank has sent, on loopback both ranks'.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SIZES = (784, 2048, 2048, 2048, 10)
BATCH, WARMUP_STEPS = 64, 2
DGC = {"algorithm": "dgc", "density": 0.001}
WAYS: dict[str, dict[str, Any] | None] = {
    "deepspeed": None,
    "dgc": DGC,
    "dgc, overlap": {**DGC, "overlap": True},
}


def sent_bytes() -> int:
    """By this host."""
    device = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return int(Path(f"/sys/class/net/{device}/statistics/tx_bytes").read_text())


def measure(block: dict[str, Any] | None, steps: int) -> dict[str, Any]:
    """One way on this rank: the median step in ms, and the mean bytes of a step."""
    import deepspeed
    import torch
    from torch import nn

    from distopt.integrations import deepspeed as ours

    torch.manual_seed(0)
    layers = [part for pair in itertools.pairwise(SIZES) for part in (nn.Linear(*pair), nn.ReLU())][:-1]
    model = nn.Sequential(*layers)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH,
        "optimizer": {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9}},
        "gradient_clipping": 0.0,
    }
    if block is not None:
        config["distopt"] = block
    initialize = deepspeed.initialize if block is None else ours.initialize
    engine = initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]
    images, labels = torch.randn(BATCH, SIZES[0]), torch.randint(SIZES[-1], (BATCH,))
    times = []
    before = 0
    for step in range(WARMUP_STEPS + steps):
        torch.distributed.barrier()
        if step == WARMUP_STEPS:
            before = sent_bytes()
        began = time.perf_counter()
        engine.backward(nn.functional.cross_entropy(engine(images), labels))
        engine.step()
        times.append(time.perf_counter() - began)
    sent = (sent_bytes() - before) / steps
    result = {"ms": 1e3 * statistics.median(times[WARMUP_STEPS:]), "bytes_on_interface": round(sent), "steps": steps}
    if block is not None:
        stats = engine.distopt.stats()
        result["bytes_encoded"] = stats["last"]["bytes_sent"]
        engine.distopt.detach()
    return result


def work(steps: dict[str, int], path: str) -> None:
    """A rank."""
    import deepspeed
    import torch

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo, not shared memory
    deepspeed.init_distributed("gloo")
    found = {way: measure(block, steps[way]) for way, block in WAYS.items()}
    if torch.distributed.get_rank() == 0:
        Path(path).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where to write; other rates in it are kept")
    parser.add_argument("--rate", help="of a link between two network namespaces (root only); without it, loopback")
    parser.add_argument("--steps", type=int, default=20, help="of the block; plain DeepSpeed takes a quarter of them")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    steps = {way: args.steps if block else max(3, args.steps // 4) for way, block in WAYS.items()}
    if args.worker:
        work(steps, args.worker)
        return
    with_python = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the hosts start `python`
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", PATH=with_python, PYTHONPATH=str(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/found.json"
        script = [str(Path(__file__)), "--json", "none", "--steps", str(args.steps), "--worker", path]
        if args.rate:
            cluster = ["bash", str(ROOT / "launch/netns_cluster.sh"), "--name", "deepspeed", "--deadline", "540"]
            subprocess.run([*cluster, "once", "2", args.rate, "--", *script], check=True)
        else:
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            subprocess.run([*torchrun, *script], check=True, timeout=540)
        found = json.loads(Path(path).read_text())
    result = json.loads(args.json.read_text()) if args.json.exists() else {}
    import deepspeed
    import torch

    result["machine"] = {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
    }
    result[args.rate or "loopback"] = found
    args.json.write_text(json.dumps(result, indent=2) + "\n")
    for way, figures in found.items():
        print(f"{way:14} {figures['ms']:9.1f} ms  {figures['bytes_on_interface']:12,} bytes on the interface per step")


if __name__ == "__main__":
    main()
