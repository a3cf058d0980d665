import os
import threading

import pytest
import torch

from distopt.comm import GlooTransport, InProcess, agree_on_secret, read_secret
from distopt.errors import ConfigError, PeerLostError
from mpirun import finish, needs_mpi, start

GOOD = "0123456789abcdef"


def test_no_variable_no_secret():
    assert read_secret({}) is None


def test_the_variable_holds_it():
    assert read_secret({"DISTOPT_JOB_SECRET": f" {GOOD}\n"}) == GOOD.encode()


def test_the_environment_of_the_process_is_the_default(monkeypatch):
    monkeypatch.setenv("DISTOPT_JOB_SECRET", GOOD)
    assert read_secret() == GOOD.encode()
    monkeypatch.delenv("DISTOPT_JOB_SECRET")
    assert read_secret() is None


def in_file(path, content, mode=0o600):
    path.write_bytes(content)
    path.chmod(mode)
    return {"DISTOPT_JOB_SECRET_FILE": str(path)}


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640])
def test_a_file_holds_it(tmp_path, mode):
    assert read_secret(in_file(tmp_path / "secret", GOOD.encode() + b"\n", mode)) == GOOD.encode()
    assert read_secret(in_file(tmp_path / "binary", bytes(range(128, 160)))) == bytes(range(128, 160))


@pytest.mark.parametrize("mode", [0o644, 0o604])
def test_a_file_that_everybody_can_read_is_refused(tmp_path, mode):
    path = tmp_path / "secret"
    with pytest.raises(ConfigError, match=f"can read the job secret in {path}; chmod 600 {path}"):
        read_secret(in_file(path, GOOD.encode(), mode))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.* cannot be read: No such file"):
        read_secret({"DISTOPT_JOB_SECRET_FILE": str(tmp_path / "nowhere")})
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory"):
        read_secret({"DISTOPT_JOB_SECRET_FILE": str(tmp_path)})


@pytest.mark.parametrize("content", ["", " \n", "0123456789abcde", " 0123456789abcde "])
def test_a_short_or_empty_one_is_refused_with_the_command_that_makes_one(tmp_path, content):
    for environ in ({"DISTOPT_JOB_SECRET": content}, in_file(tmp_path / "secret", content.encode())):
        with pytest.raises(ConfigError, match=r"at least 16 bytes, got (0|15); .*secrets\.token_hex\(32\)"):
            read_secret(environ)


def test_no_secret_is_ever_part_of_a_message(tmp_path):
    with pytest.raises(ConfigError) as error:
        read_secret({"DISTOPT_JOB_SECRET": "hidden-word"})
    assert "hidden-word" not in str(error.value)


def test_two_sources_are_one_too_many(tmp_path):
    environ = {"DISTOPT_JOB_SECRET": GOOD, **in_file(tmp_path / "secret", GOOD.encode())}
    with pytest.raises(ConfigError, match="both are set; unset one"):
        read_secret(environ)


def agreed_in_process(size):
    ends = InProcess.connect(size)
    secrets = [None] * size

    def agree(end):
        secrets[end.rank] = agree_on_secret(end, 20.0)

    threads = [threading.Thread(target=agree, args=(end,)) for end in ends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    return secrets


def test_all_ranks_of_a_job_hold_one_secret_and_another_job_another():
    first, second = agreed_in_process(4), agreed_in_process(4)
    assert len(set(first)) == len(set(second)) == 1
    assert first[0] != second[0]
    assert len(first[0]) == 32


def test_it_is_as_random_as_the_system_can(monkeypatch):
    drawn = []
    real = os.urandom
    monkeypatch.setattr(os, "urandom", lambda count: drawn.append(real(count)) or drawn[-1])
    assert agreed_in_process(2)[1] in drawn


def agree_over_gloo():
    jobs = []
    for _ in range(2):
        transport = GlooTransport(max_frame_bytes=1000)
        jobs.append(agree_on_secret(transport, 20.0))
        transport.close(10.0)
    return jobs


def test_gloo_ranks_agree(ranks):
    told = ranks(3)(agree_over_gloo)
    assert told[0] == told[1] == told[2]
    assert told[0][0] != told[0][1]


OVER_MPI = """
from distopt.comm import MPITransport, Sealed, agree_on_secret
import torch
transport = MPITransport(max_frame_bytes=1 << 20)
secret = agree_on_secret(transport)
sealed = Sealed(transport, secret)
if sealed.rank == 0:
    told = [sealed.receive(30.0) for _ in range(sealed.size - 1)]
    assert sorted(source for source, _ in told) == [1, 2], told
    assert {bytes(got.tolist()) for _, got in told} == {secret}
    assert not sealed.refused
    print("all hold the same", flush=True)
else:
    sealed.send(0, torch.tensor(list(secret), dtype=torch.uint8))
sealed.close(20.0)
"""


@needs_mpi
@pytest.mark.job
def test_mpi_ranks_agree_and_talk_sealed(tmp_path):
    (tmp_path / "ranks.py").write_text(OVER_MPI)
    job = start(3, tmp_path / "ranks.py")
    said = finish(job)
    assert job.returncode == 0, said
    assert "all hold the same" in said


def test_other_words_are_no_secret_and_silence_ends():
    ends = InProcess.connect(3)
    for source, words in ((2, b"DSEC" + bytes(32)), (0, b"DSEC" + bytes(31)), (0, b"XSEC" + bytes(32))):
        ends[source].send(1, torch.frombuffer(bytearray(words), dtype=torch.uint8))
    with pytest.raises(PeerLostError, match=r"rank 1 has got no job secret from rank 0 within 0\.2 s"):
        agree_on_secret(ends[1], 0.2)
    ends[0].die()
    with pytest.raises(PeerLostError):
        agree_on_secret(ends[2], 100.0)
