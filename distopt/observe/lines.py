"""One line of JSON for each so many steps: written whole, continued after a resume, read back."""

import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from distopt.errors import ConfigError
from distopt.observe.plain import plain

Line: TypeAlias = dict[str, Any]

_log = logging.getLogger("distopt")
_NAME = re.compile(r"stats-(\d+)\.jsonl")


class LineFile:
    """A file of lines, each with a "step".

    A run that is resumed goes on in it: the lines of steps that are done once more are removed, as is half a line that
    a crash has left, and nothing else. The file is opened when the first line is written, at which the step is known.

    Args:
        path: Of the file, in a folder that exists.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None

    def write(self, line: Mapping[str, Any], *, first_step: int) -> None:
        """Writes a line, by one call of the system: a process that is killed leaves whole lines.

        Args:
            line: With a "step".
            first_step: The first of the steps that are done now.

        Raises:
            OSError: The disk does not take it.
        """
        if self._file is None:
            self._file = self._open(first_step)
        try:
            text = json.dumps(line, allow_nan=False)
        except (TypeError, ValueError):  # something that JSON does not have, which is rare: looking for it takes longer
            text = json.dumps(plain(line), allow_nan=False)
        content = (text + "\n").encode()
        while content:
            content = content[os.write(self._file, content) :]

    def read(self) -> list[Line]:
        """Its lines, see `read_lines`."""
        return read_lines(self._path)

    def close(self) -> None:
        """Closes the file; a line written later opens it again."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _open(self, first_step: int) -> int:
        if self._path.exists():
            content = self._path.read_bytes()
            there = read_lines(self._path)
            kept = [line for line in there if line["step"] < first_step]
            if len(kept) < len(there):
                _log.warning(
                    "%s: %d lines of steps from %d on are removed, since these steps are done once more",
                    self._path, len(there) - len(kept), first_step,
                )  # fmt: skip
            new = b"".join(json.dumps(line).encode() + b"\n" for line in kept)
            if new != content:
                beside = self._path.with_name(self._path.name + ".new")
                beside.write_bytes(new)
                beside.replace(self._path)
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)


def read_lines(path: str | os.PathLike[str]) -> list[Line]:
    """The lines of a file; half a line at its end, which a crash has left, is passed over.

    Raises:
        ConfigError: The file cannot be read, or another line is not of a log; names the line.
    """
    lines = []
    try:
        content = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"{path} must be a log, got {error.strerror}; give the folder of a job's log") from error
    *whole, _ = content.split("\n")
    for number, text in enumerate(whole, 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise ConfigError(
                f"{path}, line {number}, must be an object with a step, got {text!r:.80}; remove the line"
            )
        lines.append(line)
    return lines


def read_folder(folder: str | os.PathLike[str]) -> dict[int, list[Line]]:
    """The lines of every rank in a job's folder, by rank.

    Raises:
        ConfigError: There are none, or a file is not a log.
    """
    found = {int(name[1]): path for path in Path(folder).glob("stats-*.jsonl") if (name := _NAME.fullmatch(path.name))}
    ranks = {rank: lines for rank in sorted(found) if (lines := read_lines(found[rank]))}
    if not ranks:
        raise ConfigError(
            f"{os.fspath(folder)} must hold stats-0.jsonl, got no line there; give the folder of [log] in distopt.toml"
        )
    return ranks


def line_file(folder: Path, rank: int) -> LineFile:
    """Of one rank in a job's folder, which is made if it is not there.

    Raises:
        ConfigError: The folder cannot be written, or the file that is there is not a log.
    """
    path = folder / f"stats-{rank}.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666))
    except OSError as error:
        raise ConfigError(
            f"folder of log must be one that can be written, got {os.fspath(folder)!r} ({error.strerror}); "
            'use "runs/job/log"'
        ) from error
    read_lines(path)  # what is wrong with it is to be said now, not behind the first step
    return LineFile(path)
