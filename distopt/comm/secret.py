"""The job secret: who has it may take part. It comes from the environment or a file, or is drawn by rank 0.

Limits: all who have it are trusted alike, so members are not protected from each other, and nothing is encrypted.
"""

import os
import stat
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from distopt.comm.transport import Transport
from distopt.errors import ConfigError, PeerLostError

SECRET, SECRET_FILE = "DISTOPT_JOB_SECRET", "DISTOPT_JOB_SECRET_FILE"  # environment variables
MIN_SECRET_BYTES = 16
_DRAWN_BYTES = 32
_MAGIC = b"DSEC"  # a letter first: gloo's transport has frames of its own
_MAKE = 'make one with python -c "import secrets; print(secrets.token_hex(32))"'


def read_secret(environ: Mapping[str, str] = os.environ) -> bytes | None:
    """The job secret that the environment names, without white space at its ends; None where it names none.

    Raises:
        ConfigError: Both variables are set, the file cannot be read or others can read it, or the secret is too short.
    """
    text, file = environ.get(SECRET), environ.get(SECRET_FILE)
    if text is not None and file is not None:
        raise ConfigError(f"one of {SECRET} and {SECRET_FILE} says what the job secret is, and both are set; unset one")
    if text is not None:
        return check_secret(os.fsencode(text).strip(), SECRET)
    if file is None:
        return None
    try:
        with Path(file).open("rb") as opened:
            mode = os.fstat(opened.fileno()).st_mode
            if stat.S_ISREG(mode) and mode & stat.S_IROTH:
                raise ConfigError(f"every user of this machine can read the job secret in {file}; chmod 600 {file}")
            secret = opened.read().strip()
    except OSError as error:
        raise ConfigError(f"{SECRET_FILE} is {file!r}, which cannot be read: {error.strerror}; name a file") from error
    return check_secret(secret, file)


def check_secret(secret: bytes, origin: str = "secret") -> bytes:
    """The secret, if it is one.

    Raises:
        ConfigError: It is not bytes, or has fewer than 16.
    """
    if not isinstance(secret, bytes):
        raise ConfigError(f"{origin}: a job secret must be bytes, got {type(secret).__name__}; {_MAKE}")
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(
            f"{origin}: a job secret must have at least {MIN_SECRET_BYTES} bytes, got {len(secret)}; {_MAKE}"
        )
    return secret


def agree_on_secret(transport: Transport, timeout_s: float = 60.0) -> bytes:
    """A secret that rank 0 has drawn for this job; the same on all ranks. Collective, the first use of the transport.

    For a job without a secret of its own whose ranks were connected by a launcher (gloo, MPI, one process): it travels
    there as it is, so it keeps out what comes later or by another way, not who can read that first message. Frames of
    others that arrive meanwhile are dropped.

    Raises:
        PeerLostError: Nothing came from rank 0 within `timeout_s`, or it is lost.
    """
    if transport.rank == 0:
        secret = os.urandom(_DRAWN_BYTES)
        frame = torch.frombuffer(bytearray(_MAGIC + secret), dtype=torch.uint8)
        for rank in range(1, transport.size):
            transport.send(rank, frame)
        return secret
    end = time.monotonic() + timeout_s
    while 0 not in transport.lost and (left := end - time.monotonic()) > 0:
        got = transport.receive(min(left, 1.0))
        if got is None or got[0] != 0:
            continue
        said = got[1][: len(_MAGIC) + _DRAWN_BYTES].numpy().tobytes()
        if len(said) == len(_MAGIC) + _DRAWN_BYTES and said.startswith(_MAGIC):
            return said[len(_MAGIC) :]
    raise PeerLostError(
        f"rank {transport.rank} has got no job secret from rank 0 within {timeout_s:g} s; see the output of rank 0, or "
        f"set {SECRET} on all ranks",
        (0,),
    )
