"""How the ranks of a job keep a checkpoint together: who writes what, and when it counts. One class for each family.

Replicas are equal: rank 0 writes what they share, every rank what its algorithm holds back. Under gossip and
between local steps models differ, so every rank writes its own, and those that are left go on where one is lost
meanwhile. In coded training rank 0 has all there is.
"""

import logging
import os
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distopt import checkpoint
from distopt.comm import gather_json, raise_together
from distopt.errors import (
    CompatibilityError,
    ConfigError,
    DistoptError,
    PeerLostError,
    StateMismatchError,
    in_a_line,
)
from distopt.job.checkpoint_folder import CheckpointFolder, Mark, Part, load_parts, save_parts

_log = logging.getLogger("distopt")
_CPU = torch.device("cpu")
_SHARED = "shared"
_APPEARS_S = 10.0  # a folder on a network file system shows a new file within seconds


class Keeper(ABC):
    """Saves and loads the parts of a run and its attachment, all ranks together.

    Args:
        folder: Of the checkpoints.
        attachment: What `attach` returned.
        parts: What belongs to a checkpoint, by name, the model first.
    """

    def __init__(self, folder: CheckpointFolder, attachment: Any, parts: Mapping[str, Part]) -> None:
        self._folder = folder
        self._attachment = attachment
        self._parts = parts

    @abstractmethod
    def save(self, mark: Mark) -> None:
        """Makes a checkpoint. Every rank must call it at the same place of its loop."""

    @abstractmethod
    def resume(self) -> Mark | None:
        """Loads the newest complete one, the same on every rank; None where there is none.

        Raises:
            StateMismatchError: It is damaged, or of another model, algorithm or number of ranks.
            ConfigError: The folder cannot be written, or is not the same on every rank.
        """

    def _states(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._parts.items()}

    def _take_back(self, states: Mapping[str, Any]) -> None:
        if states.keys() != self._parts.keys():
            raise StateMismatchError(
                f"a checkpoint must hold the parts of this run, {', '.join(self._parts)}, got {', '.join(states)}; "
                "attach with the same parts as before"
            )
        for name, part in self._parts.items():
            try:
                part.load_state_dict(states[name])
            except (RuntimeError, ValueError, KeyError) as error:
                raise StateMismatchError(f"the {name} of the checkpoint does not fit this one: {error}") from error

    def _facts(self, num_ranks: int) -> dict[str, Any]:
        return {"algorithm": self._attachment.algorithm.to_dict(), "ranks": num_ranks, "step": self._attachment.step}

    def _write(self, mark: Mark, write: Callable[[], object]) -> DistoptError | None:
        """What is wrong where a file cannot be written, for the others to hear."""
        try:
            write()
        except DistoptError as error:
            return error
        except Exception as error:  # of a full disk torch has its own, and pickle others of what it cannot take
            why = getattr(error, "strerror", None) or in_a_line(error)
            return StateMismatchError(
                f"{mark} cannot be written to {self._folder.path} ({why}); make room there, or leave what cannot be "
                "pickled out of the parts"
            )
        return None


class OfReplicas(Keeper):
    """Of the ddp family: models are equal on every rank."""

    def __init__(self, folder: CheckpointFolder, attachment: Any, parts: Mapping[str, Part]) -> None:
        super().__init__(folder, attachment, parts)
        self._group: dist.ProcessGroup = attachment.process_group
        self._device = attachment.device

    def save(self, mark: Mark) -> None:
        """See `Keeper.save`."""
        problem = self._write(mark, lambda: self._save_own(mark))
        raise_together(problem, self._group, self._device, what="cannot save")  # behind it every file is there
        if self._group.rank() == 0:
            self._folder.complete(mark, self._facts(self._group.size()))

    def _save_own(self, mark: Mark) -> None:
        place = self._folder.begin(mark)
        checkpoint.save(self._attachment, place)
        if self._group.rank() == 0:
            save_parts(self._states(), place, _SHARED)

    def resume(self) -> Mark | None:
        """See `Keeper.resume`; also where another number of ranks has saved it."""
        mark = agreed_newest(self._folder, self._group, self._device)
        if mark is not None:
            place = self._folder.place_of(mark)
            problem = None
            try:
                self._folder.facts(mark)  # of this format
                self._take_back(load_parts(place, _SHARED))
            except StateMismatchError as error:
                problem = error
            raise_together(problem, self._group, self._device, what="cannot resume")
            checkpoint.load(self._attachment, place)
        return mark


class OfDifferent(Keeper):
    """Models differ by rank, and ranks come and go."""

    def save(self, mark: Mark) -> None:
        """See `Keeper.save`. Where a rank is lost meanwhile there is no checkpoint, and the run goes on."""
        self._everybody_is_here()
        place, num_ranks = self._attachment.place

        def write() -> None:
            begun = self._folder.begin(mark)
            checkpoint.save(self._attachment, begun)
            save_parts(self._states(), begun, _stem(place, num_ranks))

        problem = self._write(mark, write)
        self._everybody_is_here()
        if problem is not None and not isinstance(problem, PeerLostError):
            raise problem
        if self._attachment.place != (place, num_ranks):
            _log.warning("%s is left out: ranks have come or gone while it was written", mark)
        elif place == 0 and not _appear(lambda: len(self._files(mark, num_ranks)) == 2 * num_ranks):
            _log.warning("%s is left out: not every rank has written its files", mark)
        elif place == 0:
            self._folder.complete(mark, self._facts(num_ranks))

    def _files(self, mark: Mark, num_ranks: int) -> list[Path]:
        """Two of each rank: its parts, and what says that its attachment's state is whole."""
        begun = self._folder.begin(mark)
        return [*begun.glob(f"rank-*-of-{num_ranks:05d}-*.pt"), *begun.glob(f"distopt-*-of-{num_ranks:05d}.json")]

    def resume(self) -> Mark | None:
        """See `Keeper.resume`; as many ranks as have saved it."""
        group: dist.ProcessGroup | None = self._attachment.process_group
        mark = self._folder.newest() if group is None else agreed_newest(self._folder, group, _CPU)
        if mark is None:
            return None
        place, num_ranks = self._attachment.place
        problem = None
        try:
            if (saved := self._folder.facts(mark)["ranks"]) != num_ranks:
                raise StateMismatchError(
                    f"models differ by rank, so {mark} of {saved} ranks needs as many, got {num_ranks}; "
                    f"start {saved}, or name another folder"
                )
            self._take_back(load_parts(self._folder.place_of(mark), _stem(place, num_ranks)))
        except StateMismatchError as error:
            problem = error
        self._attachment.raise_together(problem)
        checkpoint.load(self._attachment, self._folder.place_of(mark))
        return mark

    def _everybody_is_here(self) -> None:
        """Waits for those that take part now."""
        for others in reversed(range(self._attachment.place[1])):
            try:
                self._ask_all()
            except PeerLostError:
                if not others:
                    raise
                continue  # somebody has gone meanwhile; those that are left are asked again
            return

    @abstractmethod
    def _ask_all(self) -> None:
        """Something in which all that take part now must have a part.

        Raises:
            PeerLostError: Somebody has gone meanwhile.
        """


class OfGossip(OfDifferent):
    """Of the gossip family."""

    def _ask_all(self) -> None:
        self._attachment.consensus_distance()


class OfLocalSteps(OfDifferent):
    """Of local steps: between two exchanges each rank has its own model."""

    def _ask_all(self) -> None:
        self._attachment.add_up(torch.zeros(1))()


class OfMaster(Keeper):
    """Of coded training: what rank 0 has counts, and workers get the model from it."""

    def save(self, mark: Mark) -> None:
        """See `Keeper.save`."""
        if self._attachment.rank == 0:
            problem = self._write(mark, lambda: self._save_all(mark))
            if problem is not None:
                raise problem
            self._folder.complete(mark, self._facts(self._attachment.num_workers))

    def _save_all(self, mark: Mark) -> None:
        states = {**self._states(), "distopt": self._attachment.state_dict()}
        save_parts(states, self._folder.begin(mark), _SHARED)

    def resume(self) -> Mark | None:
        """See `Keeper.resume`; no rank hears of the others', so that the folder must be one."""
        if self._attachment.rank == 0:
            self._folder.clear()
        mark = self._folder.newest()
        if mark is not None:
            self._folder.facts(mark)  # of this format
            states = load_parts(self._folder.place_of(mark), _SHARED)
            own = states.pop("distopt", None)
            self._take_back(states)
            self._attachment.load_state_dict(own)
        return mark


KEEPERS: dict[str, type[Keeper]] = {"ddp": OfReplicas, "gossip": OfGossip, "local": OfLocalSteps, "coding": OfMaster}


def keeper_for(folder: CheckpointFolder, attachment: Any, parts: Mapping[str, Part]) -> Keeper:
    """The keeper of the attachment's family.

    Raises:
        CompatibilityError: There is none for it, or a part has no state.
    """
    for name, part in parts.items():
        if not (hasattr(part, "state_dict") and hasattr(part, "load_state_dict")):
            raise CompatibilityError(
                f"what belongs to a checkpoint must have state_dict and load_state_dict, got {type(part).__name__} as "
                f"{name}; leave the table checkpoint out and save by distopt.checkpoint"
            )
    family = getattr(attachment, "family", None)
    if family not in KEEPERS:
        raise CompatibilityError(
            f"checkpoints are kept for the families {', '.join(KEEPERS)}, got {type(attachment).__name__} of "
            f"{family!r}; leave the table checkpoint out and save by distopt.checkpoint"
        )
    return KEEPERS[family](folder, attachment, parts)


def agreed_newest(folder: CheckpointFolder, group: dist.ProcessGroup, device: torch.device) -> Mark | None:
    """What rank 0 finds to be the newest, having cleared the folder that all share. Collective.

    Raises:
        ConfigError: The folder cannot be written, or not every rank sees what rank 0 writes there.
    """
    probe, problem, mark = folder.path / f".shared-{secrets.token_hex(6)}", None, None
    if group.rank() == 0:
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            probe.touch()
            folder.clear()
            mark = folder.newest()
        except OSError as error:
            problem = ConfigError(
                f"folder of checkpoint must be one that can be written, got {os.fspath(folder.path)!r} "
                f"({error.strerror}); name another"
            )
    raise_together(problem, group, device, what="cannot keep checkpoints")
    name, found = gather_json([probe.name, None if mark is None else str(mark)], group, device)[0]
    probe = probe.with_name(name)
    seen = _appear(probe.exists)
    try:
        raise_together(None if seen else _not_shared(folder), group, device, what="cannot keep checkpoints")
    finally:
        if group.rank() == 0:
            probe.unlink(missing_ok=True)
    return Mark.parse(found or "")


def _appear(there: Callable[[], bool]) -> bool:
    """Whether it is there, at once or a little later."""
    end = time.monotonic() + _APPEARS_S
    while not (seen := there()) and time.monotonic() < end:
        time.sleep(0.1)
    return seen


def _not_shared(folder: CheckpointFolder) -> ConfigError:
    return ConfigError(
        f"folder of checkpoint must be one that all ranks share, got {os.fspath(folder.path)!r}, where a file of rank "
        "0 does not appear; name a folder on a file system that all hosts share, by its whole path"
    )


def _stem(place: int, num_ranks: int) -> str:
    return f"rank-{place:05d}-of-{num_ranks:05d}"
