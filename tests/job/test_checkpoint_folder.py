"""What counts as a checkpoint, which is the newest, what is kept, and what is said of a damaged one."""

import hashlib
import json

import numpy as np
import pytest
import torch

from distopt.errors import CompatibilityError, StateMismatchError
from distopt.job.checkpoint_folder import CheckpointFolder, Mark, load_parts, save_parts


@pytest.fixture
def folder(tmp_path):
    return CheckpointFolder(tmp_path / "checkpoints", keep=2)


def make(folder, done, unit="step"):
    mark = Mark(unit, done)
    (folder.begin(mark) / "file").write_text(str(done))
    folder.complete(mark, {"step": done})
    return mark


def test_none_at_first(folder):
    assert folder.newest() is None
    assert folder.complete_ones() == []


def test_one_that_is_not_complete_does_not_count_and_is_cleared(folder):
    made = make(folder, 9)
    (folder.begin(Mark("step", 10)) / "file").touch()
    assert folder.newest() == made
    folder.clear()
    assert [each.name for each in folder.path.iterdir()] == ["step-9"]


def test_the_newest_are_kept_by_number_not_by_name(folder):
    for done in (8, 9, 10, 11):
        make(folder, done)
    assert folder.complete_ones() == [Mark("step", 10), Mark("step", 11)]
    assert sorted(each.name for each in folder.path.iterdir()) == ["step-10", "step-11"]


def test_one_that_is_made_again_replaces_the_old_one(folder):
    make(folder, 5)
    (folder.place_of(Mark("step", 5)) / "old").touch()
    mark = make(folder, 5)
    assert sorted(each.name for each in folder.place_of(mark).iterdir()) == ["checkpoint.json", "file"]
    assert folder.facts(mark)["step"] == 5


def test_other_things_in_the_folder_are_left_alone(folder):
    make(folder, 1)
    others = ["step-1.bak", "step-", "step-01", "notes.txt", "phase-9"]
    for name in others:
        (folder.path / name).mkdir()
    for done in (2, 3, 4):
        make(folder, done)
    folder.clear()
    assert sorted(each.name for each in folder.path.iterdir()) == sorted([*others, "step-3", "step-4"])


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"format": 99}), json.dumps({"step": 1})])
def test_facts_of_another_version_or_damaged(folder, content):
    mark = make(folder, 1)
    (folder.place_of(mark) / "checkpoint.json").write_text(content)
    with pytest.raises(StateMismatchError, match=r"must say what the checkpoint holds.*remove .*step-1 to go"):
        folder.facts(mark)


def test_parts_come_back_and_a_flipped_byte_is_noticed(tmp_path):
    save_parts({"model": {"w": torch.arange(3.0)}, "schedule": {"last_epoch": 3}}, tmp_path, "shared")
    states = load_parts(tmp_path, "shared")
    assert torch.equal(states["model"]["w"], torch.arange(3.0))
    assert states["schedule"] == {"last_epoch": 3}
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(StateMismatchError, match="must be whole, got another digest than its name says"):
        load_parts(tmp_path, "shared")


def test_parts_that_are_written_again_replace_the_old_ones(tmp_path):
    save_parts({"model": 1}, tmp_path, "rank-00000-of-00001")
    save_parts({"model": 2}, tmp_path, "rank-00000-of-00001")
    assert load_parts(tmp_path, "rank-00000-of-00001") == {"model": 2}


class OfTheUser:
    """Loading it would run code."""


def test_nothing_is_unpickled_but_plain_values(tmp_path):
    content = tmp_path / "content"
    torch.save({"own": OfTheUser()}, content)
    digest = hashlib.sha256(content.read_bytes()).hexdigest()[:16]
    content.rename(tmp_path / f"shared-{digest}.pt")
    with pytest.raises(StateMismatchError, match=r"must hold tensors and plain values, got .*OfTheUser; remove"):
        load_parts(tmp_path, "shared")


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    with pytest.raises(CompatibilityError, match=r"something else in that of own: .*OfTheUser; have its state_dict"):
        save_parts({"plain": 1, "own": {"deep": [OfTheUser()]}}, tmp_path, "shared")
    assert not list(tmp_path.glob("shared-*.pt"))


def test_numbers_of_numpy_are_plain_values(tmp_path):
    saved = {"lr": np.float64(0.1), "epoch": np.int64(3), "best": np.float32(0.5), "done": np.bool_(True)}
    save_parts({"scheduler": saved}, tmp_path, "shared")
    assert load_parts(tmp_path, "shared") == {"scheduler": saved}


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(StateMismatchError, match=r"must have one file shared-\*.pt, got 0 .*that all hosts share"):
        load_parts(tmp_path, "shared")
