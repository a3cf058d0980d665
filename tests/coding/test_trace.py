"""Traces: files of all forms come back equal, shifts are the paper's, and each malformed line is named."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from distopt.coding import Trace
from distopt.errors import ConfigError

TIMES = np.array([[0.81, 0.79, 4.02], [0.8, np.nan, 0.84]])


def equal(left, right):
    for name in ("seconds", "compute"):
        one, other = getattr(left, name), getattr(right, name)
        if (one is None) != (other is None) or (one is not None and not np.array_equal(one, other, equal_nan=True)):
            return False
    return (left.load, left.seconds_per_load) == (right.load, right.seconds_per_load)


@pytest.mark.parametrize("name", ["trace.csv", "trace.json"])
@settings(deadline=None, max_examples=50)
@given(
    times=arrays(
        float, array_shapes(min_dims=2, max_dims=2, max_side=5), elements=st.one_of(st.floats(0, 1e6), st.just(np.nan))
    ),
    load=st.floats(0, 1),
    slope=st.one_of(st.none(), st.floats(0, 100)),
    with_compute=st.booleans(),
)
def test_what_is_saved_is_read(tmp_path_factory, name, times, load, slope, with_compute):
    times[0, 0] = 1.0
    compute = times / 2 if with_compute else None
    trace = Trace(seconds=times, load=load, seconds_per_load=slope, compute=compute)
    path = tmp_path_factory.getbasetemp() / name
    trace.save(path)
    assert equal(Trace.read(path), trace)


def read(tmp_path, text, **given):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    return Trace.read(path, **given)


@pytest.mark.parametrize(
    "text",
    [
        "# load = 0.5\n# seconds_per_load = 2.2\n0.81,0.79,4.02\n0.80,nan,0.84\n",
        "# a comment\n#load=0.5\n # seconds_per_load=2.2\n\nhost a,host b,host c\n0.81, 0.79, 4.02\n0.80,,0.84\n",
        "\ufeff# load = 0.5\n# seconds_per_load = 2.2\nround,worker,seconds\n"
        "0,0,0.81\n0,1,0.79\n1,2,0.84\n1,0,0.8\n0,2,4.02\n",
        '{"load": 0.5, "seconds_per_load": 2.2, "seconds": [[0.81, 0.79, 4.02], [0.8, null, 0.84]]}',
    ],
    ids=["wide", "with names", "long", "json"],
)
def test_the_forms_mean_the_same(tmp_path, text):
    assert equal(read(tmp_path, text), Trace(seconds=TIMES, load=0.5, seconds_per_load=2.2))


def test_what_is_given_beside_the_file_counts(tmp_path):
    text = "# load = 0.5\n# seconds_per_load = 2.2\n1,2\n"
    assert equal(read(tmp_path, text, load=0.25), Trace(seconds=[[1, 2]], load=0.25, seconds_per_load=2.2))
    assert read(tmp_path, "1,2\n", load=0, seconds_per_load=3).slope == 3


def test_a_shift_is_the_slope_times_the_difference_of_the_loads():
    trace = Trace(seconds=TIMES, load=0.5, seconds_per_load=2.0)
    assert np.array_equal(trace.at_load(0.5), TIMES, equal_nan=True)
    np.testing.assert_allclose(trace.at_load(0.75), TIMES + 0.5)
    np.testing.assert_allclose(trace.at_load(np.array([0.5, 0.0, 1.0])), TIMES + np.array([0, -TIMES[0, 1], 1]))
    np.testing.assert_allclose(trace.at_load(0.75, seconds_per_load=4.0), TIMES + 1.0)


def test_the_slope_from_compute_times():
    trace = Trace(seconds=TIMES, load=0.25, compute=[[0.5, 0.4, 0.6], [0.5, np.nan, 0.5]])
    assert trace.slope == 0.5 / 0.25
    assert Trace(seconds=TIMES, load=0.25, compute=TIMES, seconds_per_load=7).slope == 7
    for unknown in (Trace(seconds=TIMES, load=0.25), Trace(seconds=TIMES, load=0, compute=TIMES)):
        with pytest.raises(ConfigError, match=r"seconds_per_load must be known .* add a line `# seconds_per_load"):
            unknown.at_load(0.5)


def test_parts_of_a_trace():
    trace = Trace(seconds=TIMES, load=0.5, compute=TIMES / 2)
    assert equal(trace.first(1), Trace(seconds=TIMES[:1], load=0.5, compute=TIMES[:1] / 2))
    assert equal(trace.after(1), Trace(seconds=TIMES[1:], load=0.5, compute=TIMES[1:] / 2))
    order = np.array([2, 0, 1])
    assert equal(trace.reordered(order), Trace(seconds=TIMES[:, order], load=0.5, compute=TIMES[:, order] / 2))
    shifted = trace.shifted(np.array([0, 1, 0]))
    assert np.array_equal(shifted.seconds, [[0.81, np.nan, 4.02], [0.8, 0.79, 0.84]], equal_nan=True)
    assert np.array_equal(shifted.compute, shifted.seconds / 2, equal_nan=True)
    with pytest.raises(ValueError, match="read-only"):
        trace.seconds[0, 0] = 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2\n", "load must be known, and the trace does not say it; add a line `# load = 0.1`"),
        ("", "trace.csv: a trace must have at least one round, got none"),
        ("# load = 0.5\n", "a trace must have at least one round, got none"),
        ("# load = 0.5\na,b\n", r"seconds must be a matrix \(rounds, workers\) that is not empty"),
        ("# load = 0.5\n1,2\n3\n", "line 3: a round must have 2 times like the first line, got 1"),
        ("# load = 0.5\n1,2\n3,x\n", "line 3, column 2: a time must be a number, got 'x'"),
        ("# load = 0.5\n1;2\n3;4\n", "line 3, column 1: a time must be a number, got '3;4'"),
        ("# load = 0.5\n1,2\n3,-4\n", "line 3, column 2: a time must be at least 0 and finite, got -4"),
        ("# load = 0.5\n1,inf\n", "line 2, column 2: a time must be at least 0 and finite, got inf"),
        ("# load = 0,5\n1,2\n", "line 1: load must be a number, got '0,5'; use a point"),
        ("# load = 1.5\n1,2\n", r"load must be a number in \[0, 1\], got 1.5"),
        ("# load = nan\n1,2\n", r"load must be a number in \[0, 1\], got nan"),
        ("# load = 1\n# seconds_per_load = -1\n1,2\n", "seconds_per_load must be a number of at least 0, got -1"),
        ("# load = 1\nnan,nan\n", "seconds must hold at least one answer, got only nan"),
        ("# load = 1\nround,worker,compute_s\n0,0,1\n", "line 2: the header must be round,worker,seconds"),
        ("# load = 1\nround,worker,seconds\n", "a trace must have at least one answer, got none"),
        ("# load = 1\nround,worker,seconds\n0,0\n", "line 3: an answer must have 3 values like the header, got 2"),
        ("# load = 1\nround,worker,seconds\n0,0,1\n0,0,2\n", "line 4: round 0, worker 0 must come once, got it twice"),
        ("# load = 1\nround,worker,seconds\n0,-1,1\n", "line 3: worker must be a number counted from 0, got '-1'"),
        ("# load = 1\nround,worker,seconds\n0,99999999,1\n", "rounds and workers must be counted from 0"),
        ('{"load": 1,\n "seconds": [[1, 2]', "line 2: not JSON"),
        ('{"load": 1, "second": [[1, 2]]}', "unknown key 'second'; known keys are load"),
        ('{"load": 1}', "the key 'seconds' is missing"),
        ('{"load": 1, "seconds": [[1, 2], [3]]}', r"seconds must be a matrix of numbers \(rounds, workers\)"),
        ('{"load": "much", "seconds": [[1, 2]]}', r"load must be a number in \[0, 1\], got 'much'"),
        ('{"load": 1, "seconds": [[1, -2]]}', "seconds must be at least 0 and finite, got -2.0 of worker 1 in round 0"),
        ('{"load": 1, "seconds": [[1, 2]], "compute_s": [[1]]}', "compute must have the shape of seconds"),
        ('{"load": 1, "seconds": []}', r"seconds must be a matrix \(rounds, workers\) that is not empty"),
    ],
)
def test_each_malformed_file_says_where_and_what_to_do(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read: .*No such file"):
        Trace.read(tmp_path / "none.csv")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"cannot be read: .*give a CSV or JSON file"):
        Trace.read(tmp_path / "bytes.csv")


def test_json_has_no_nan(tmp_path):
    Trace(seconds=TIMES, load=0.5).save(tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text())["seconds"][1][1] is None
