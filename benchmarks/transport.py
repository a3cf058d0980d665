"""What authentication costs: frames over TCP on loopback, with and without a job secret, and the hash alone.

    OMP_NUM_THREADS=1 python benchmarks/transport.py --json benchmarks/results/transport-NAME.json

The contenders take turns in each round, so that a disturbance hits all of them. Both ends are threads of this process,
so that they share the interpreter: two processes are faster.

- large: megabytes per second of 32 frames of 16 MiB from a peer to the server, until all are received;
- small: microseconds for a frame of 1 KiB and its answer;
- hmac: megabytes per second of HMAC-SHA256 on 16 MiB, which a sealed frame needs once at each end.
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


def megabytes_per_second(server, peer, frame):
    begin = time.perf_counter()
    for _ in range(FRAMES):
        peer.send(0, frame)
    for _ in range(FRAMES):
        assert server.receive(60.0) is not None
    return FRAMES * frame.numel() / (time.perf_counter() - begin) / 1e6


def microseconds(server, peer, frame):
    begin = time.perf_counter()
    for _ in range(ANSWERS):
        peer.send(0, frame)
        assert server.receive(60.0) is not None
        server.send(1, frame)
        assert peer.receive(60.0) is not None
    return (time.perf_counter() - begin) / ANSWERS * 1e6


def hash_megabytes_per_second(frame):
    begin = time.perf_counter()
    tag_of(b"k" * 32, b"", memoryview(frame.numpy()))
    return frame.numel() / (time.perf_counter() - begin) / 1e6


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
    work = {"hmac_mb_s": lambda: hash_megabytes_per_second(large)}
    for name, pair in ends.items():
        work[f"{name}_large_mb_s"] = lambda pair=pair: megabytes_per_second(*pair, large)
        work[f"{name}_small_us"] = lambda pair=pair: microseconds(*pair, small)
    samples = {name: [] for name in work}
    for number in range(arguments.rounds + 1):
        for name, measure in work.items():
            value = measure()
            if number:  # the first round warms up
                samples[name].append(value)
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
