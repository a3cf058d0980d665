"""What authentication costs: frames over TCP on loopback, with and without a job secret, and the hash alone.

    OMP_NUM_THREADS=1 python benchmarks/transport.py --json benchmarks/results/transport-NAME.json

The contenders take turns in each round, so that a disturbance hits all of them. Both ends are threads of this process,
so that they share the interpreter: two processes are faster.

- large: megabytes per second of 32 frames of 16 MiB from a peer to the server, until all are received, and the
  processor's seconds for a gigabyte, both ends together, which a busy machine disturbs less;
- small: microseconds for a frame of 1 KiB and its answer;
- hmac: megabytes per processor second of HMAC-SHA256 on 16 MiB, which a sealed frame needs once at each end.
"""

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path

import torch

from compress import commit, summary
from distopt.cli.machine import machine, versions
from distopt.comm import InProcess, Sealed, TCPPeer, TCPServer
from distopt.comm.session import tag_of

LARGE, FRAMES = 16 << 20, 32
SMALL, ANSWERS = 1 << 10, 500


def over_tcp(secret):
    server = TCPServer(
        "127.0.0.1:0", size=2, max_frame_bytes=LARGE, secret=secret, max_pending_bytes=2 * FRAMES * LARGE
    )
    return server, TCPPeer(str(server.address), rank=1, size=2, max_frame_bytes=LARGE, secret=secret)


def large_frames(server, peer, frame):
    begin, worked = time.perf_counter(), time.process_time()
    for _ in range(FRAMES):
        peer.send(0, frame)
    for _ in range(FRAMES):
        assert server.receive(60.0) is not None
    megabytes = FRAMES * frame.numel() / 1e6
    return {
        "large_mb_s": megabytes / (time.perf_counter() - begin),
        "large_cpu_s_gb": (time.process_time() - worked) / megabytes * 1e3,
    }


def microseconds(server, peer, frame):
    begin = time.perf_counter()
    for _ in range(ANSWERS):
        peer.send(0, frame)
        assert server.receive(60.0) is not None
        server.send(1, frame)
        assert peer.receive(60.0) is not None
    return {"small_us": (time.perf_counter() - begin) / ANSWERS * 1e6}


def hashing(frame):
    begin = time.process_time()
    tag_of(b"k" * 32, b"", memoryview(frame.numpy()))
    return {"mb_cpu_s": frame.numel() / (time.process_time() - begin) / 1e6}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    secret = os.urandom(32)
    ends = {
        "tcp": over_tcp(None),
        "tcp_with_secret": over_tcp(secret),
        "sealed_in_process": tuple(Sealed(end, secret) for end in InProcess.connect(2)),
    }
    large, small = torch.ones(LARGE, dtype=torch.uint8), torch.ones(SMALL, dtype=torch.uint8)
    work = [("hmac", lambda: hashing(large))]
    for name, pair in ends.items():
        work.append((name, lambda pair=pair: large_frames(*pair, large)))
        work.append((name, lambda pair=pair: microseconds(*pair, small)))
    samples = {}
    for number in range(arguments.rounds + 1):
        for name, measure in work:
            for figure, value in measure().items():
                if number:  # the first round warms up
                    samples.setdefault(f"{name}_{figure}", []).append(value)
    found = {name: summary(values) for name, values in samples.items()}
    for pair in ends.values():
        for end in reversed(pair):
            end.close(5.0)
    for name, figures in found.items():
        print(f"{name:28} {figures}")
    if arguments.json:
        report = {
            "command": shlex.join(["python", *sys.argv]),
            "commit": commit(),
            "machine": machine(),
            "versions": versions(),
            "results": found,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
