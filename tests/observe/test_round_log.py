"""The log of a federated job has each round once, also where it was resumed, and its report adds up the history."""

import numpy as np
import torch
from torch import nn

from distopt.federated import ClientData, FedAvg, Simulation
from distopt.observe import RoundLog, read_lines


def make(folder, log):
    torch.manual_seed(0)
    parts = [np.arange(6), np.arange(6, 12)]
    clients = ClientData((torch.ones(12, 4), torch.zeros(12, dtype=torch.int64)), parts)
    return Simulation(
        model=nn.Linear(4, 2), clients=clients, algorithm=FedAvg(), evaluate=lambda model: {"answer": 0.25},
        checkpoint=folder / "run.pt", checkpoint_every=2, progress=log,
    )  # fmt: skip


def test_a_resumed_job(tmp_path):
    with RoundLog(tmp_path) as log:
        make(tmp_path, log).run(3)
    log = RoundLog(tmp_path)
    simulation = make(tmp_path, log)
    assert simulation.resume()
    history = simulation.run(5)
    text = log.close()
    assert [line["stats"] for line in read_lines(tmp_path / "stats-0.jsonl")] == history.rows
    assert (tmp_path / "report.txt").read_text() == text + "\n"
    assert "5 rounds, up to round 5; 2.0 clients in a round" in text
    assert f"Sent down {sum(r['bytes_down'] for r in history)} bytes, up {sum(r['bytes_up'] for r in history)}" in text
    assert "answer 0.25" in text
