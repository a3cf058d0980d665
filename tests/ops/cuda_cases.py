"""What the tests of the CUDA kernels need, and why they are skipped where it is not there."""

import pytest
import torch

from distopt import ops

_HERE = torch.cuda.is_available()
_MISSING = ops.build_info().cuda_problem or "the reference was asked for"

NEEDS_CUDA_KERNELS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _HERE, reason="no CUDA device here"),
    pytest.mark.skipif(_HERE and ops.build_info().cuda_library is None, reason=f"no CUDA kernels: {_MISSING}"),
]
