"""What ranks run for the tests of the documents."""

import contextlib
import io
import os

import torch.distributed as dist


def run_blocks(blocks, folder):
    """Runs them one after the other as one script; what was printed."""
    os.chdir(folder)
    dist.init_process_group, initialised = lambda *_, **__: None, dist.init_process_group  # the pool has done it
    said, names = io.StringIO(), {}
    try:
        with contextlib.redirect_stdout(said):
            for block in blocks:
                exec(compile(block, "docs/gossip.md", "exec"), names)
    finally:
        dist.init_process_group = initialised
        if "attached" in names:
            names["attached"].detach()
    return said.getvalue(), names["mean"]["0.weight"], set(names["attached"].stats())
