"""What TensorBoard reads is what the ranks and the simulation say."""

import gossip_rank
import pytest

from distopt.gossip import Gossip, TensorBoard, simulate
from tensorboard_events import scalars


def events(folder):
    """Of each name, [(step, value)]."""
    found = scalars(folder)
    return {name: [(event.step, pytest.approx(event.value)) for event in events] for name, events in found.items()}


def test_a_simulation(tmp_path):
    with TensorBoard(tmp_path) as board:
        history = simulate(
            Gossip(), make_model=gossip_rank.make_model, batches=gossip_rank.batches(3), steps=6, evaluate_every=2,
            optimizer=gossip_rank.make_optimizer, evaluate=lambda model: {"answer": 42.0}, progress=board,
        )  # fmt: skip
    found = events(tmp_path)
    assert set(found) == {"answer", "bytes_sent", "consensus_distance", "variance_ratio"}
    for name, written in found.items():
        assert [(row["step"], row[name]) for row in history.rows] == written
    assert [step for step, _ in found["answer"]] == [2, 4, 6]


class Attached:
    """What is written of an attachment."""

    def __init__(self):
        self.distance = 0.5
        self.told = {
            "steps": 7, "exchanges": 3, "passed": 1, "bytes_sent": 10, "seconds_exchanging": 0.25, "meetings": 0,
            "members": [0, 2], "variance_ratio": 0.75,
        }  # fmt: skip

    def consensus_distance(self):
        if self.distance is None:
            from distopt.errors import PeerLostError

            raise PeerLostError("a rank has gone")
        return self.distance

    def stats(self):
        return self.told


def test_a_rank(tmp_path):
    attached = Attached()
    with TensorBoard(tmp_path) as board:
        board.record(attached, loss=2.0)
        attached.told, attached.distance = {**attached.told, "steps": 9, "variance_ratio": None}, None
        board.record(attached, loss=1.0)
    found = events(tmp_path)
    assert found["consensus_distance"] == [(7, 0.5)]
    assert found["variance_ratio"] == [(7, 0.75)]
    assert found["loss"] == [(7, 2.0), (9, 1.0)]
    assert found["members"] == [(7, 2), (9, 2)]
    assert set(found) == {"consensus_distance", "loss", *attached.told} - {"steps"}
