"""The federated example, with the data that are installed and with scikit-learn's digits in their place."""

import re

import pytest

from example_ranks import AS_IT_IS, EXAMPLES

EXAMPLE = EXAMPLES / "federated_fashion.py"
WITHOUT_FASHION = """
from pathlib import Path
is_dir = Path.is_dir
Path.is_dir = lambda path: path.name != "fashion-mnist" and is_dir(path)
"""


@pytest.mark.parametrize(
    ("before", "rounds", "learnt"),
    [(WITHOUT_FASHION, 60, 0.5), pytest.param("", 100, 0.6, marks=pytest.mark.job)],
    ids=["digits", "installed"],
)
def test_it_learns_says_so_and_leaves_a_plot(warm_python, tmp_path, before, rounds, learnt):
    ran = warm_python.run(before + AS_IT_IS, EXAMPLE, rounds, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    accuracy = re.search(rf"test accuracy ([0-9.]+)% after {rounds} rounds", ran.stdout)
    assert float(accuracy[1]) / 100 > learnt
    assert (tmp_path / "federated_fashion.png").read_bytes().startswith(b"\x89PNG")
