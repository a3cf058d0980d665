"""Each malformed file says where and what to do; the forms that mean the same are in the tests of their readers."""

import pytest

from distopt.errors import ConfigError
from distopt.federated import TracedDelays, TracedParticipation


def read(tmp_path, text, model):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    return model(path=str(path)).begin(2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "trace.csv: there must be at least one round, got none; write one line per round"),
        ("# a comment\n", "trace.csv: there must be at least one round, got none"),
        ("a,b\n", "trace.csv: there must be at least one round and one client, got none"),
        ("0,1\n1\n", "line 2: a round must have 2 values like the first, got 1; one for each client"),
        ("0,1\n\n1,2\n", "line 3, column 2: active must be 0 or 1, got '2'; write 1 where the client takes part"),
        ("0,1\n1,\n", "line 2, column 2: active must be 0 or 1, got ''"),
        ("0,1\n1,x\n", "line 2, column 2: active must be 0 or 1, got 'x'"),
        ("round,client,seconds\n0,1,1\n", "line 1: the header must be round,client,active, got round,client,seconds"),
        ("round,client\n0\n", "line 2: an entry must have round and client, got 1 values; mend the line"),
        ("round,client\n", "trace.csv: there must be at least one entry, got none; write one line per entry"),
        ("round,client\n0,1\n0,1\n", "line 3: round 0, client 1 must come once, got it twice; remove one"),
        ("round,client\n0,-1\n", "line 2: client must be an integer counted from 0, got '-1'; mend it"),
        ("round,client\n0.5,1\n", "line 2: round must be an integer counted from 0, got '0.5'"),
        ("# num_rounds = 2\nround,client\n4,1\n", "num_rounds must be at least 5, got 2"),
        ("# num_rounds = x\nround,client\n4,1\n", "line 1: num_rounds must be an integer counted from 0, got 'x'"),
        ('{"rounds": [[0, 1],\n [1, 1]', "line 2: not JSON"),
        ('{"round": [[0, 1]]}', "unknown key 'round'; known keys are rounds, entries, num_rounds"),
        ("{}", "there must be a list of lists under either 'rounds' or 'entries'; give one of them"),
        ('{"rounds": [[0, 1]], "entries": [[0, 1]]}', "there must be a list of lists under either 'rounds' or"),
        ('{"rounds": [0, 1]}', "there must be a list of lists under either"),
        ('{"rounds": [[0, true]]}', "round 0, column 2: active must be 0 or 1, got True"),
        ('{"rounds": [[0, null]]}', "round 0, column 2: active must be 0 or 1, got None"),
        ('{"rounds": []}', "there must be at least one round and one client, got none"),
        ('{"rounds": [[]]}', "there must be at least one round and one client, got none"),
        ('{"entries": [[0, 1], [0, 1.0]]}', "entry 1: client must be an integer counted from 0, got 1.0"),
        ('{"entries": [[0, 1]], "num_rounds": -1}', "num_rounds must be an integer counted from 0, got -1"),
    ],
)
def test_malformed_participation(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text, TracedParticipation)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "1,2\n0,1\n",
            "line 2, column 1: seconds must be a positive number of seconds, got '0'; leave out",
        ),
        ("1,2\n-1,1\n", "line 2, column 1: seconds must be a positive number of seconds, got '-1'"),
        ("1,2\n1,inf\n", "line 2, column 2: seconds must be a positive number of seconds, got 'inf'"),
        ("1,2\n1,x\n", "line 2, column 2: seconds must be a positive number of seconds, got 'x'"),
        ("round,client\n0,1\n", "line 1: the header must be round,client,seconds, got round,client; write it so"),
        ("round,client,seconds\n0,1\n", "line 2: an entry must have round, client and seconds, got 2 values"),
        ("round,client,seconds\n0,1,\n", "line 2: seconds must be a positive number of seconds, got ''"),
        ('{"rounds": [[1, "fast"]]}', "round 0, column 2: seconds must be a positive number of seconds, got 'fast'"),
        ('{"rounds": [[1, [2]]]}', "round 0, column 2: seconds must be a positive number of seconds, got "),
        ('{"entries": [[0, 1]]}', "entry 0: an entry must have round, client and seconds, got 2 values"),
    ],
)
def test_malformed_delays(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text, TracedDelays)
    assert read(tmp_path, "\ufeff1,2\nnull,3\n", TracedDelays).mean_s.tolist() == [1.0, 2.5]


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    for name in ("bytes.csv", "none.csv"):
        with pytest.raises(ConfigError, match=rf"{name} cannot be read: .*; give a CSV or JSON file"):
            TracedDelays(path=str(tmp_path / name)).begin(1)
