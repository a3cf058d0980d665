"""The examples of the training frameworks: each is the plain script and few lines more."""

import ast
import re

import pytest

from example_ranks import EXAMPLES

MARK = re.compile(r".*# distopt$")


@pytest.mark.parametrize("name", ["accelerate", "lightning", "fabric", "trainer"])
def test_at_most_twenty_lines_are_added(name):
    lines = (EXAMPLES / f"{name}_dgc.py").read_text().splitlines()
    plain = [line for line in lines if not MARK.match(line)]
    assert 0 < len(lines) - len(plain) <= 20
    tree = ast.parse("\n".join(plain))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not used & {"distopt", "attach", "attached", "DistoptCallback", "compression", "stats"}
