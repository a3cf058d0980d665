"""`distopt job`: what a file means, what is wrong with it, and the file to begin with."""

import dataclasses
import json
import re
import tomllib

import pytest
from typer.testing import CliRunner

import distopt
from distopt.cli.app import app
from distopt.cli.describe_job import default_text
from distopt.config import Algorithm
from distopt.errors import ConfigError
from distopt.job import CheckpointSettings, LogSettings


def job(*arguments):
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, ["job", *map(str, arguments)])


def test_the_file_to_begin_with_is_right_and_replaces_none(tmp_path):
    path = tmp_path / "distopt.toml"
    assert job(path, "--init").exit_code == 0
    loaded = distopt.Job.load(path)
    assert (loaded.checkpoint, loaded.log) == (CheckpointSettings(), LogSettings())
    assert loaded.algorithm == distopt.DGC(density=0.001, warmup=distopt.ddp.PaperWarmup(stage=500))
    again = job(path, "--init")
    assert isinstance(again.exception, ConfigError)
    assert "must not exist yet" in str(again.exception)


def test_what_is_commented_out_is_right_too_and_is_the_default_unless_it_says_otherwise():
    text = default_text()
    parts = re.split(r"(?m)^# -- of ([a-z-]+)", text.partition("[checkpoint]")[0])[1:]
    assert parts[::2] == ["dgc", "gossip", "gradient-coding"]
    for name, part in zip(parts[::2], parts[1::2], strict=True):
        settings = re.findall(r"(?m)^# ([a-z_]+ = .*)$", part)
        kind = Algorithm._known[name]
        assert len(settings) >= 2
        for line in settings:
            ((key, value),) = tomllib.loads(line).items()
            made = distopt.from_config({"algorithm": name, key: value})
            if "left out:" not in line:
                assert getattr(made, key) == getattr(kind(), key), line


def test_what_a_file_means(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert job("--init").exit_code == 0  # distopt.toml here
    (tmp_path / "runs/job/checkpoints/step-300").mkdir(parents=True)
    ran = job()
    assert ran.exit_code == 0, ran.output
    assert "distopt.toml: dgc, for a DistributedDataParallel model" in ran.output
    assert (
        "Checkpoints: every 500 steps to runs/job/checkpoints, the newest 2 are kept; the job goes on from step-300"
        in (ran.output)
    )
    assert "Log: every 50 steps to runs/job/log, report" in ran.output
    found = json.loads(job("--json").output)
    assert found["changed"] == ["warmup"]
    assert found["settings"]["density"] == 0.001
    assert set(found["settings"]) <= {field.name for field in dataclasses.fields(distopt.DGC)}


def test_without_tables(tmp_path):
    path = tmp_path / "job.json"
    path.write_text('{"algorithm": "gossip"}')
    ran = job(path)
    assert "gossip, for the bare model" in " ".join(ran.output.split())
    assert "Checkpoints: none" in ran.output
    assert "Log: none" in ran.output


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('algorithm = "dgc"\ndensty = 1', "unknown key 'densty' for algorithm 'dgc'"),
        ('algorithm = "fedavg"', "describe it for distopt simulate"),
        ("", "'algorithm' must be one of"),
    ],
)
def test_what_is_wrong_is_said_with_the_file(tmp_path, text, said):
    path = tmp_path / "distopt.toml"
    path.write_text(text)
    ran = job(path)
    assert isinstance(ran.exception, ConfigError)
    assert str(ran.exception).startswith(f"{path}: ")
    assert said in str(ran.exception)
    assert ran.exit_code != 0
