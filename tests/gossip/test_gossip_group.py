"""Which process groups gossip can begin with."""

import pytest
import torch

import distopt
from distopt.errors import CompatibilityError


class OfNcclAlone:
    """A group as it is after `init_process_group("nccl")`."""

    def _get_backend(self, device):
        raise RuntimeError(f"No backend type associated with device type {device.type}")


def test_a_group_without_cpu_tensors_is_refused_before_anything_waits(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_backend", lambda group: "nccl")
    model = torch.nn.Linear(2, 2)
    with pytest.raises(CompatibilityError, match=r'got \'nccl\'; use init_process_group\("cpu:gloo,cuda:nccl"\)'):
        distopt.Gossip().attach(model, torch.optim.SGD(model.parameters(), lr=0.1), process_group=OfNcclAlone())
