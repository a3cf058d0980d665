"""What the package says on its logger."""

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def heard() -> Iterator[list[tuple[str, str]]]:
    """Yields the list of (level, message) of what is logged meanwhile in this process."""
    said: list[tuple[str, str]] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append((record.levelname, record.getMessage()))

    log, listener = logging.getLogger("distopt"), Listener()
    before = log.level
    log.addHandler(listener)
    log.setLevel(logging.INFO)
    try:
        yield said
    finally:
        log.removeHandler(listener)
        log.setLevel(before)
