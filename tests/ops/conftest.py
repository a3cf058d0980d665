"""Each test of the operations leaves the CPU path and the number of threads as it found them."""

import pytest
import torch

from distopt import ops
from distopt.ops import native


@pytest.fixture(autouse=True)
def _same_path_and_threads():
    path, threads = ops.backend(), torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if path != native.REFERENCE:
        native.use_path(path)
