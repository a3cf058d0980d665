"""The report says what the lines say: totals over resumed parts, shares of a step, who is slow, whether it paid."""

import json

import pytest

from distopt.cli import main
from distopt.observe import report

DDP = {
    "algorithm": "dgc", "world_size": 2, "backend": "avx2", "paused": False, "skipped_steps": 0, "routes": {},
    "buckets_sparse": 1, "buckets_dense": 0, "heartbeat": {"lost_ranks": []},
}  # fmt: skip


def ddp_lines(steps, *, first=1, wait_ms=2.0, step_ms=10.0, rank=0, sent=100, dense=10_000, **stats):
    """A line of the first step and one of the last; counts and seconds grow alike in each step."""
    lines = []
    for done in (1, steps):
        counted = {
            "steps": done, "bytes_sent": sent * done, "bytes_dense": dense * done, "link_bytes_sent": sent * done,
            "link_bytes_dense": dense * done, "seconds_selecting": 1e-3 * done, "seconds_decoding": 5e-4 * done,
            "seconds_communicating": 1e-3 * wait_ms * done,
        }  # fmt: skip
        line = {"step": first - 1 + done, "first_step": first, "rank": rank, "family": "ddp"}
        lines.append({**line, "seconds": 1e-3 * step_ms * (done - 1), "stats": {**DDP, **counted, **stats}})
    return lines


def test_totals_and_shares():
    text = report({0: ddp_lines(101)})
    assert "dgc on 2 ranks, avx2 kernels: 101 steps, 10.0 ms each, up to step 101" in text
    assert "Sent: 10.1 kB, 100.0 times less than dense fp32 (1.0 MB)" in text
    assert "1.00 ms   10%  selecting" in text
    assert "2.00 ms   20%  communicating" in text
    assert "0.50 ms    5%  decoding" in text
    assert "Warning" not in text


def test_a_resumed_run_is_added_up():
    # the first part ended at step 101, the second began with 102
    text = report({0: ddp_lines(101) + ddp_lines(11, first=102, step_ms=21.0)})
    assert ": 112 steps, 11.0 ms each, up to step 112" in text
    assert "Sent: 11.2 kB" in text
    assert "The run was resumed" in text


@pytest.mark.parametrize(
    ("changes", "warns"),
    [
        ({"sent": 10_000, "dense": 4_000}, "it put 2.5x of the dense bytes on the link"),
        # at the rate seen, dense takes 2 ms * 1.5 = 3 ms at most; this takes 1 + 2 + 0.5
        ({"sent": 100, "dense": 150}, "at most 3.0 ms per step, this one takes 3.5 ms"),
        ({"sent": 100, "dense": 180}, None),
        ({"sent": 10_000, "dense": 4_000, "algorithm": "dense"}, None),
        ({"skipped_steps": 3}, "3 steps were left out"),
        ({"heartbeat": {"lost_ranks": [1]}}, "lost ranks: 1"),
    ],
)
def test_warnings(changes, warns):
    text = report({0: ddp_lines(101, **changes)})
    assert ("Warning" in text) == (warns is not None)
    assert warns is None or warns in text


def test_the_slowest_rank_is_named():
    alike = report({rank: ddp_lines(101, rank=rank) for rank in (0, 1)})
    assert "All ranks are about as fast" in alike
    waited_for = report({0: ddp_lines(101, wait_ms=6.0), 1: ddp_lines(101, wait_ms=1.0)})
    assert "Slowest: rank 1, which waits least; rank 0 waits 5.0 ms longer in each step." in waited_for
    apart = report({0: ddp_lines(101), 1: ddp_lines(101, step_ms=20.0)})
    assert "Slowest: rank 1, 2.00x the time of rank 0 per step." in apart


def test_a_run_of_one_step_has_a_report():
    text = report({0: ddp_lines(101)[:1]})
    assert ": 1 steps, up to step 1" in text
    assert "Of a step" not in text


def test_the_command(tmp_path, capsys, monkeypatch):
    for rank in (0, 1):
        lines = ddp_lines(101, rank=rank)
        (tmp_path / f"stats-{rank}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr("sys.argv", ["distopt", "report", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert capsys.readouterr().out == report({rank: ddp_lines(101, rank=rank) for rank in (0, 1)}) + "\n"
    monkeypatch.setattr("sys.argv", ["distopt", "report", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "must hold stats-0.jsonl" in capsys.readouterr().err
