"""One checkpoint file per rank, with a manifest that says what is in it and whether it arrived whole.

The files of a checkpoint lie in one directory that every rank can read. Each is written beside its final name and
renamed, so a crash never leaves half of one. Ranks do not wait for each other: a crash between them leaves files of two
steps, which `load` refuses, so give every checkpoint a directory of its own. Nothing is unpickled on load but tensors
and plain values.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from distopt.errors import DistoptError, StateMismatchError

_FORMAT = 1


class Saveable(Protocol):
    """What can be saved: an attachment."""

    process_group: dist.ProcessGroup

    def state_dict(self) -> dict[str, Any]:
        """This rank's state."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes back the states of one or more ranks."""

    def raise_together(self, problem: DistoptError | None) -> None:
        """Raises on every rank if any rank has a problem. Collective."""


def save(attachment: Saveable, directory: str | os.PathLike[str]) -> None:
    """Writes this rank's state. Every rank must call it; it does not wait for the others.

    Args:
        attachment: What `attach` returned.
        directory: One for each checkpoint; made if it does not exist. Files of an earlier save with as many ranks are
            replaced. Each shard of a sharded model has a folder of its own in it.
    """
    folder = _folder_of(attachment, directory)
    folder.mkdir(parents=True, exist_ok=True)
    state = attachment.state_dict()
    rank, num_ranks = _place(attachment)  # only now: ranks may have gone while it was made
    stem = _stem(rank, num_ranks)
    temporary = folder / f"{stem}.tmp"
    torch.save(state, temporary)
    digest = _digest(temporary)
    path = temporary.rename(folder / f"{stem}-{digest[:12]}.pt")
    manifest = {
        "format": _FORMAT,
        "rank": rank,
        "num_ranks": num_ranks,
        "step": state["step"],
        "file": path.name,
        "sha256": digest,
    }
    temporary.write_text(json.dumps(manifest))
    temporary.replace(folder / f"{stem}.json")  # from here on the new file counts, and the old one does not
    for old in folder.glob(f"{stem}-*.pt"):
        if old != path:
            old.unlink()


def load(attachment: Saveable, directory: str | os.PathLike[str]) -> None:
    """Takes a checkpoint back, also one of another number of ranks. Every rank must call it.

    Raises:
        StateMismatchError: A file is missing or damaged, or belongs to another model, algorithm or step.
        CompatibilityError: Another rank cannot load; quotes why.
    """
    rank, num_ranks = _place(attachment)
    folder = _folder_of(attachment, directory)
    loaded: list[dict[str, Any]] = []
    problem = None
    try:
        manifests = _manifests(folder)
        loaded = [_read(folder, manifests[old]) for old in dealt_out(len(manifests), rank, num_ranks)]
    except StateMismatchError as error:
        problem = error
    attachment.raise_together(problem)
    merged = dict(loaded[0])
    merged["ranks"] = {old: memories for state in loaded for old, memories in state["ranks"].items()}
    attachment.load_state_dict(merged)


def read_any(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The state that one of the ranks saved, for what is the same on all of them. Not a collective.

    Raises:
        StateMismatchError: A file is missing or damaged.
    """
    folder = Path(directory)
    return _read(folder, _manifests(folder)[0])


def load_distributed(attachment: Saveable, checkpoint_id: str | os.PathLike[str], *, key: str = "distopt") -> None:
    """Takes back what `torch.distributed.checkpoint.save({key: attachment, ...})` wrote, on any number of ranks.

    With the number of ranks it was saved on, `torch.distributed.checkpoint.load({key: attachment})` does the same; with
    another that function cannot know which ranks' entries to read. Every rank must call it.

    Raises:
        StateMismatchError: The checkpoint has no such key, or is of another model or algorithm.
    """
    # Here, not above: they bring DTensor and sympy, which take longer to import than distopt.
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

    reader = FileSystemReader(checkpoint_id)
    metadata = reader.read_metadata()
    paths = {name: path for name, path in (metadata.planner_data or {}).items() if path[0] == key}
    if (key, "world_size") not in paths.values():
        found = sorted({str(path[0]) for path in (metadata.planner_data or {}).values()})
        raise StateMismatchError(f"the checkpoint must hold an attachment under {key!r}, got {found}; give its key")
    rank, num_ranks = attachment.process_group.rank(), attachment.process_group.size()
    first: dict[str, Any] = {name: None for name, path in paths.items() if path == (key, "world_size")}
    dcp_load(first, storage_reader=reader, process_group=attachment.process_group)
    (saved_ranks,) = first.values()
    mine = {str(old) for old in dealt_out(saved_ranks, rank, num_ranks)}
    flat: dict[str, Any] = {}
    for name, path in paths.items():
        if path[1] != "ranks" or path[2] in mine:
            entry = metadata.state_dict_metadata[name]
            if isinstance(entry, TensorStorageMetadata):
                flat[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
            else:
                flat[name] = None
    dcp_load(flat, storage_reader=reader, process_group=attachment.process_group)
    # That function leaves out empty dictionaries: they stand here.
    parameters = {path[3] for path in paths.values() if path[1:3] == ("replicated", "tensors")}
    state: dict[str, Any] = {
        "ranks": {old: {name: {} for name in parameters} for old in mine},
        "replicated": {"decay": {}},
    }
    for name, value in flat.items():
        *parents, last = paths[name][1:]
        node = state
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    attachment.load_state_dict(state)


def dealt_out(saved_ranks: int, rank: int, num_ranks: int) -> list[int]:
    """The old ranks whose state this rank brings; one that gets none brings a copy, which does not count twice."""
    return [rank] if saved_ranks == num_ranks else list(range(rank, saved_ranks, num_ranks)) or [0]


def _folder_of(attachment: Saveable, directory: str | os.PathLike[str]) -> Path:
    """Where its files lie: replicas of one shard of a model number their ranks as those of another do."""
    shard: str = getattr(attachment, "shard", "")
    return Path(directory) / f"shard-{shard.replace(' ', '-')}" if shard else Path(directory)


def _place(attachment: Saveable) -> tuple[int, int]:
    """Its place among those that save together, and how many they are."""
    place: tuple[int, int] | None = getattr(attachment, "place", None)  # of ranks that come and go
    return (attachment.process_group.rank(), attachment.process_group.size()) if place is None else place


def _stem(rank: int, num_ranks: int) -> str:
    return f"distopt-{rank:05d}-of-{num_ranks:05d}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifests(folder: Path) -> list[dict[str, Any]]:
    """The manifests of all ranks, in rank order, checked to be of one checkpoint."""
    manifests = []
    for path in sorted(folder.glob("distopt-*-of-*.json")):
        try:
            manifest = json.loads(path.read_text())
            manifests.append({key: manifest[key] for key in ("rank", "num_ranks", "step", "file", "sha256")})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(path, f"{type(error).__name__}: {error}") from error
    sizes = sorted({manifest["num_ranks"] for manifest in manifests})
    if len(sizes) != 1 or [manifest["rank"] for manifest in manifests] != list(range(sizes[0])):
        found = ", ".join(f"{manifest['rank']} of {manifest['num_ranks']}" for manifest in manifests) or "none"
        raise StateMismatchError(
            f"a checkpoint directory must hold the file of every rank, got {found} in {folder}; save each checkpoint "
            "into a directory of its own"
        )
    steps = sorted({manifest["step"] for manifest in manifests})
    if len(steps) != 1:
        raise StateMismatchError(
            f"the files of a checkpoint must be of one step, got steps {steps} in {folder}; the last save was cut off: "
            "use an earlier checkpoint"
        )
    return manifests


def _read(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    path = folder / manifest["file"]
    try:
        if _digest(path) != manifest["sha256"]:
            raise _damaged(path, "another digest than in its manifest")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    return state


def _damaged(path: Path, found: str) -> StateMismatchError:
    return StateMismatchError(f"a checkpoint file must be whole, got {found} for {path}; use an earlier checkpoint")
