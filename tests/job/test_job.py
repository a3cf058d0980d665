"""A job's file, block or mapping: what it makes, and what is said where it is wrong."""

import json

import pytest

import distopt
from distopt.errors import ConfigError
from distopt.job import CheckpointSettings, Job, LogSettings

TEXT = """
algorithm = "dgc"
density = 0.01
warmup = { schedule = "paper", stage = 5 }

[checkpoint]
folder = "runs/a"
keep = 3

[log]
folder = "runs/b"
tensorboard = true

[batch]
eta = 0.3
learning_rate = "square-root"
"""
JOB = Job(
    algorithm=distopt.DGC(density=0.01, warmup=distopt.ddp.PaperWarmup(stage=5)),
    checkpoint=CheckpointSettings(folder="runs/a", keep=3),
    log=LogSettings(folder="runs/b", tensorboard=True),
    batch=distopt.AdaptiveBatch(eta=0.3, learning_rate=distopt.batch.SquareRoot()),
)


@pytest.fixture
def write(tmp_path):
    def written(text, name="distopt.toml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return written


def test_all_forms_of_a_job_are_one(write):
    forms = [write(TEXT), str(write(TEXT)), write(json.dumps(JOB.to_dict()), "distopt.json"), JOB.to_dict(), JOB]
    assert [Job.load(form) for form in forms] == [JOB] * 5
    assert [distopt.from_config(form) for form in forms] == [JOB.algorithm] * 5


def test_an_algorithm_alone_is_a_job():
    assert Job.load(distopt.TopK()) == Job.load({"algorithm": "topk"}) == Job(algorithm=distopt.TopK())
    assert Job.load(distopt.TopK()).to_dict() == distopt.TopK().to_dict()


@pytest.mark.parametrize("algorithm", sorted(distopt.config.Algorithm._known))
def test_no_algorithm_has_a_key_that_the_tables_need(algorithm):
    assert not {"checkpoint", "log", "batch"} & set(distopt.config.Algorithm._known[algorithm].__dataclass_fields__)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"densty": 0.1}, "unknown key 'densty' for algorithm 'dgc'"),
        ({"checkpoints": {}}, "unknown key 'checkpoints'"),
        ({"checkpoint": {"folder": "a", "evry": 3}}, "unknown key 'evry' for checkpoint; known keys are folder"),
        ({"checkpoint": "runs"}, 'checkpoint must be a table, got \'runs\'; use {"folder": "runs/job"}'),
        ({"checkpoint": {"folder": "a", "every": 0}}, "every of checkpoint must be an integer of at least 1, got 0"),
        ({"checkpoint": {"folder": "a", "keep": 0}}, "keep of checkpoint must be an integer of at least 1, got 0"),
        ({"checkpoint": {"folder": ""}}, "folder of checkpoint must be the name of a folder, got ''"),
        ({"batch": 3}, 'batch must be a table, got 3; use {"test": "norm"}'),
        ({"batch": {"eta": 0}}, "eta must be a positive number, got 0; use 0.1 to 0.5"),
        ({"log": {"folder": 3}}, "folder of log must be the name of a folder, got 3"),
        ({"log": {"folder": "a", "every": -1}}, "every of log must be an integer of at least 1, got -1"),
        ({"log": {"folder": "a", "tensorboard": "no"}}, "tensorboard of log must be True or False, got 'no'"),
        ({"log": {"folder": "a", "report": 1}}, "report of log must be True or False, got 1"),
    ],
)
def test_what_is_wrong_is_said(wrong, said, write):
    content = {"algorithm": "dgc", **wrong}
    with pytest.raises(ConfigError) as caught:
        distopt.from_config(content)
    assert said in str(caught.value)
    path = write(json.dumps(content), "distopt.json")
    with pytest.raises(ConfigError) as of_file:
        distopt.from_config(path)
    assert str(of_file.value) == f"{path}: {caught.value}"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("distopt.toml", "algorithm = ", "the file must be TOML, got "),
        ("distopt.json", "{", "the file must be JSON, got "),
        ("distopt.json", "[]", "the file must hold a mapping, got list"),
        ("distopt.toml", b"\xff", "the file must be TOML, got "),
        ("distopt.yaml", "a: b", "a job's file must end in .toml or .json, got 'distopt.yaml'"),
    ],
)
def test_a_file_that_is_none(write, name, text, said):
    path = write(text, name)
    with pytest.raises(ConfigError) as caught:
        Job.load(path)
    assert str(caught.value).startswith(f"{path}: {said}")


def test_no_file(tmp_path):
    with pytest.raises(ConfigError, match=r"the file cannot be read .No such file or directory.; give the path"):
        Job.load(tmp_path / "distopt.toml")


@pytest.mark.parametrize("source", [None, 3, ["dgc"]])
def test_what_cannot_be_a_job(source):
    with pytest.raises(ConfigError, match=r"a job must be a mapping, a file, an algorithm or a distopt.Job, got"):
        Job.load(source)


def test_empty_tables_ask_for_the_defaults():
    job = Job.load({"algorithm": "dgc", "checkpoint": {}, "log": {}})
    assert (job.checkpoint, job.log) == (CheckpointSettings(), LogSettings())


def test_a_job_of_the_wrong_things():
    with pytest.raises(ConfigError, match="algorithm of a job must be of Algorithm, got 'dgc'"):
        Job(algorithm="dgc")
    with pytest.raises(ConfigError, match=r"log of a job must be of LogSettings, got {}"):
        Job(algorithm=distopt.DGC(), log={})
