"""Small facts reach every rank in rank order, whatever their sizes."""

import json

import pytest
import torch
import torch.distributed as dist

from distopt.comm import gather_json

CPU = torch.device("cpu")
FACTS = {
    "sizes differ": [{"rank": 0}, {"rank": 1, "long": "x" * 5000}],
    "not ascii": [{"name": "größe"}, {"名": "層"}],
    "empty": [None, {}],
    "numbers": [[1, 2.5, -1e300], True],
    "equal": ["same", "same"],
}


def gather(facts):
    return gather_json(facts[dist.get_rank()], dist.group.WORLD, CPU)


def gather_in_subgroup():
    group = dist.new_group([1])
    return gather_json(dist.get_rank(), group, CPU) if dist.get_rank() == 1 else None


@pytest.mark.parametrize("name", FACTS)
def test_every_rank_gets_every_fact(ranks, name):
    facts = FACTS[name]
    assert ranks(2)(gather, facts) == [facts, facts]


def test_the_group_decides_who_takes_part(ranks):
    assert ranks(2)(gather_in_subgroup) == [None, [1]]


def test_only_json_travels(ranks):
    facts = [{"a": (1, 2)}, {"a": [1, 2]}]
    assert ranks(2)(gather, facts)[0] == [json.loads(json.dumps(fact)) for fact in facts]
