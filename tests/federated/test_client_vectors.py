"""Vectors by client, in memory and in a mapped file: zeros, copies, growth, checkpoints."""

import gc
import io
from pathlib import Path

import pytest
import torch

from distopt.errors import StateMismatchError
from distopt.federated.client_vectors import ClientVectors

D = 7


@pytest.fixture(params=["memory", "file"])
def folder(request, tmp_path):
    return tmp_path / "not there yet" if request.param == "file" else None


def vector(client):
    return torch.arange(D, dtype=torch.float32) + 100 * client


def mapped_files(folder):
    """The files in the folder that this process has mapped, by their names in the kernel's table."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split(maxsplit=5)[5] for line in lines if f"{folder}/" in line}


def test_who_has_none_has_zeros_and_takes_no_row(folder):
    vectors = ClientVectors(D, torch.float32, folder=folder)
    assert torch.equal(vectors.get(10**9), torch.zeros(D))
    assert torch.equal(vectors.get_many([3, 5]), torch.zeros(2, D))
    assert vectors.get_many([]).shape == (0, D)
    assert len(vectors) == 0
    assert 3 not in vectors


def test_what_was_set_stays_through_growth_and_goes_out_as_a_copy(folder):
    vectors = ClientVectors(D, torch.float32, folder=folder)
    clients = [1000 - 3 * i for i in range(300)]  # the rows grow three times
    for client in clients:
        given = vector(client)
        vectors.set(client, given)
        given.zero_()
    assert list(vectors) == clients
    assert len(vectors) == 300
    for client in clients:
        assert torch.equal(vectors.get(client), vector(client))
    vectors.get(1000).zero_()
    many = vectors.get_many([997, 5, 1000])
    assert torch.equal(many, torch.stack([vector(997), torch.zeros(D), vector(1000)]))
    many.zero_()
    assert torch.equal(vectors.get(997), vector(997))
    vectors.set(997, vector(1))
    assert torch.equal(vectors.get(997), vector(1))
    assert len(vectors) == 300


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_checkpoint_goes_on_in_memory_or_in_a_file(folder, dtype, tmp_path):
    vectors = ClientVectors(D, dtype, folder=folder)
    for client in (9, 2, 4):
        vectors.set(client, vector(client))
    file = io.BytesIO()
    torch.save(vectors.state_dict(), file)
    assert file.tell() < 4096  # what was saved are three rows, not all that there is room for
    file.seek(0)
    state = torch.load(file, weights_only=True)
    for other in (None, tmp_path / "other"):
        loaded = ClientVectors(D, dtype, folder=other)
        loaded.set(77, vector(0))
        loaded.load_state_dict(state)
        assert list(loaded) == [9, 2, 4]
        loaded.set(5, vector(5))
        assert torch.equal(loaded.get_many([2, 5, 77]), torch.stack([vector(2), vector(5), torch.zeros(D)]).to(dtype))
    assert 5 not in vectors


def test_a_state_does_not_change_with_the_vectors(folder):
    vectors = ClientVectors(D, torch.float32, folder=folder)
    vectors.set(1, vector(1))
    state = vectors.state_dict()
    vectors.set(1, vector(2))
    assert torch.equal(state["rows"], vector(1).reshape(1, D))


def test_empty_state(folder):
    vectors = ClientVectors(D, torch.float32, folder=folder)
    vectors.set(1, vector(1))
    vectors.load_state_dict(ClientVectors(D, torch.float32).state_dict())
    assert len(vectors) == 0
    vectors.set(2, vector(2))
    assert torch.equal(vectors.get(2), vector(2))


def test_state_of_another_model_is_refused():
    vectors = ClientVectors(D, torch.float32)
    vectors.set(1, vector(1))
    other = ClientVectors(D + 1, torch.float32)
    with pytest.raises(StateMismatchError, match=r"torch\.float32 of length 8, got torch\.float32 of shape \(1, 7\)"):
        other.load_state_dict(vectors.state_dict())
    with pytest.raises(StateMismatchError, match=r"must be torch\.float64"):
        ClientVectors(D, torch.float64).load_state_dict(vectors.state_dict())


def test_the_file_has_no_name_and_goes_with_the_object(tmp_path):
    vectors = ClientVectors(D, torch.float32, folder=tmp_path)
    for client in range(100):
        vectors.set(client, vector(client))
    assert list(tmp_path.iterdir()) == []  # nothing is left behind, however the process ends
    assert len(mapped_files(tmp_path)) == 1
    assert all(name.endswith("(deleted)") for name in mapped_files(tmp_path))
    row = vectors.get(99)
    del vectors
    gc.collect()
    assert mapped_files(tmp_path) == set()
    assert torch.equal(row, vector(99))
