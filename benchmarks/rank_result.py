"""One rank of a benchmark: what it is told is a JSON file, its one argument; what rank 0 finds goes to another."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run(measure: Callable[[dict[str, Any]], Any]) -> None:
    """Measures on every rank that torchrun started; rank 0 writes what it finds to the file `spec["result"]`."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    result = measure(spec)
    if dist.get_rank() == 0:
        Path(spec["result"]).write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
