"""A site goes back with its server: what clients keep is again what it was before a version, to the bit."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distopt.errors import StateMismatchError
from distopt.federated.client_vectors import ClientVectors
from distopt.federated.network.journal import Journal

CLIENTS, LENGTH = 4, 3


def begun(path=None, **described):
    tables = {name: ClientVectors(LENGTH, torch.float64) for name in ("a", "b")}
    return tables, Journal(tables, path, described)


def kept(tables):
    return {name: [table.get(client).tolist() for client in range(CLIENTS)] for name, table in tables.items()}


def answer(tables, journal, version, client, value):
    journal.about_to_answer(version, client)
    tables["a"].set(client, torch.full((LENGTH,), value, dtype=torch.float64))
    if value % 2:
        tables["b"].set(client, torch.full((LENGTH,), -value, dtype=torch.float64))


@settings(max_examples=200)
@given(st.data())
def test_it_goes_back_to_any_version_that_the_server_may_go_on_from(data):
    tables, journal = begun()
    journal.follow("first", 0)
    values = itertools.count(1)
    saved, states = 0, {0: kept(tables)}
    for version in range(data.draw(st.integers(0, 6))):
        for client in data.draw(st.lists(st.integers(0, CLIENTS - 1), unique=True)):
            answer(tables, journal, version, client, float(next(values)))
        states[version + 1] = kept(tables)
        if data.draw(st.booleans()):
            journal.saving(version + 1)
            points = {saved, version + 1}  # the server may die before the file is there, or after
            if data.draw(st.booleans()):
                saved = version + 1
                journal.saved(saved)
                points = {saved}
    else:
        points = {saved}
    back = data.draw(st.sampled_from(sorted(points)))
    journal.follow("second", back)
    assert kept(tables) == states[back]
    journal.follow("second", 0)  # the session that it is in already
    assert kept(tables) == states[back]
    answer(tables, journal, back, 0, 99.0)
    journal.follow("third", back)
    assert kept(tables) == states[back]


def test_a_version_that_is_forgotten_is_an_error():
    tables, journal = begun()
    journal.follow("first", 0)
    for version in range(4):
        answer(tables, journal, version, 1, 5.0 + version)
        journal.saving(version + 1)
        journal.saved(version + 1)
    with pytest.raises(StateMismatchError, match=r"can go back to, \[4\], got 2, and clients have answered version 3"):
        journal.follow("second", 2)
    journal.follow("second", 7)  # nobody has answered what came after 3
    assert kept(tables)["a"][1] == [8.0] * LENGTH


def test_what_was_saved_while_the_site_was_away_is_a_point_to_go_back_to():
    tables, journal = begun()
    journal.follow("first", 0)
    answer(tables, journal, 0, 1, 5.0)
    journal.saved(3)  # as the next task says
    expected = kept(tables)
    answer(tables, journal, 3, 1, 7.0)
    journal.follow("second", 3)
    assert kept(tables) == expected


def test_a_file_has_it_all(tmp_path):
    tables, journal = begun(tmp_path / "site.pt", hosts=[1])
    assert not journal.read()
    journal.follow("first", 0)
    answer(tables, journal, 0, 1, 5.0)
    journal.saving(1)
    expected = kept(tables)
    answer(tables, journal, 1, 1, 7.0)
    journal.write()
    again, other = begun(tmp_path / "site.pt", hosts=[1])
    assert other.read()
    assert kept(again) == kept(tables)
    other.follow("first", 0)
    assert kept(again) == kept(tables)
    other.follow("second", 1)
    assert kept(again) == expected
    with pytest.raises(StateMismatchError, match=r"agree in hosts, got \[1\] then and \[2\] now"):
        begun(tmp_path / "site.pt", hosts=[2])[1].read()
    (tmp_path / "site.pt").write_bytes(b"something else")
    with pytest.raises(StateMismatchError, match="must be what a site wrote"):
        begun(tmp_path / "site.pt", hosts=[1])[1].read()
