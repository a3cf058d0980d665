import gc

import hypothesis
import pytest
import torch

from example_ranks import train_undisturbed
from rank_pool import RankPool
from warm_python import WarmPython


def pytest_configure():
    torch.set_num_threads(1)  # the ranks of a test share the cores; tests of threads set their own number
    hypothesis.settings.register_profile("distopt", deadline=None)  # tests never assert times
    hypothesis.settings.load_profile("distopt")


def pytest_collection_finish():
    """Collections of garbage need not look through torch and all the tests again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def _pools():
    pools: dict[int, RankPool] = {}
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture
def ranks(_pools):
    """`ranks(n)` is a pool of n real gloo ranks: `ranks(2)(function, *args)` gives their results in rank order."""

    def pool(size: int) -> RankPool:
        return _pools.setdefault(size, RankPool(size))

    return pool


@pytest.fixture(scope="session")
def warm_python():
    """Starts scripts in new processes that have imported torch, but not distopt."""
    python = WarmPython()
    yield python
    python.close()


@pytest.fixture(scope="session")
def undisturbed(warm_python, tmp_path_factory):
    """What examples/ddp_dgc.py printed on two ranks that nothing happened to, and its folder of checkpoints."""
    checkpoints = tmp_path_factory.mktemp("undisturbed")
    return train_undisturbed(warm_python, checkpoints), checkpoints
