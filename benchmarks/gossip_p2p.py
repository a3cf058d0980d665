"""What an exchange of gossip costs beside the bare transfer of the same bytes.

    python benchmarks/gossip_p2p.py --json benchmarks/results/gossip_p2p.json

Real ranks, 25 million fp32 parameters in 50 tensors, one-peer exponential graph: each rank sends its model to one other
and takes one. "gossip" is the whole step of an optimizer without gradients to a model that gossip is attached to, and
nothing else: sending, receiving, averaging into the parameters. "raw" is `torch.distributed.batch_isend_irecv` of one
vector of the same bytes to and from the same ranks, into kept memory. Also with variance correction, which reads the
parameters twice more, and an all-reduce. Each round takes all of them in one order and back (A B C C B A), after a
barrier each; the figure is the slowest rank's time. Medians, quartiles, and the median of the ratios by round.

With more ranks than cores the ranks share them, and all contenders alike. On loopback the transfer itself is copies by
the same cores that average. `--rate` (needs root) also measures two hosts with a link of that rate, network namespaces,
where the transfer waits for the link.
"""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

from federated_jobs import write
from gossip_p2p_worker import RAW, measure
from gossip_ranks import run_ranks
from link import job

from compress import summary

WORKER = "gossip_p2p_worker.py"


def summarised(samples: dict[str, list[float]]) -> dict[str, Any]:
    """Of each contender, and of its ratio to raw by round, of which there are two samples each."""
    found = {}
    for name, values in samples.items():
        pairs = zip(values[::2], values[1::2], samples[RAW][::2], samples[RAW][1::2], strict=True)
        ratios = [(a + b) / (c + d) for a, b, c, d in pairs]
        found[name] = {"ms": summary(values), "to_raw": summary(ratios), "least_ms": min(values)}
    return found


def shown(what: str, load_before: float, samples: dict[str, list[float]]) -> dict[str, Any]:
    """Prints a table, and returns the figures."""
    found = {"load_before": round(load_before, 2), **summarised(samples)}
    print(f"{what}; load of the machine before: {load_before:.1f}")
    for name in samples:
        ms, ratio = found[name]["ms"], found[name]["to_raw"]
        print(
            f"  {name:20}{ms['median']:>9.1f} ms [{ms['quartile_1']:.1f}, {ms['quartile_3']:.1f}]".ljust(56)
            + f"{ratio['median']:>6.2f} x raw [{ratio['quartile_1']:.2f}, {ratio['quartile_3']:.2f}]",
            flush=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rate", nargs="*", default=[], help="also two hosts with such a link, as `tc` takes it")
    parser.add_argument("--numel", type=int, default=25_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--deadline", type=float, default=900.0, help="seconds for one number of ranks")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    if options.rate and os.geteuid() != 0:
        parser.error("network namespaces need root; use sudo, or leave out --rate")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the hosts are removed
    results = {}
    for ranks in options.ranks:
        before = os.getloadavg()[0]
        samples = run_ranks(measure, ranks, options.numel, options.rounds, deadline_s=options.deadline)
        results[f"{ranks} ranks"] = shown(f"{ranks} ranks", before, samples)
    for rate in options.rate:
        before = os.getloadavg()[0]
        spec = {"numel": options.numel, "rounds": options.rounds}
        samples = job(2, rate, spec, int(options.deadline), pinned=False, worker=WORKER)
        if "failed" in samples:
            raise SystemExit(f"2 hosts at {rate}: {samples['failed']}\n" + "\n".join(samples["log"]))
        results[f"2 hosts at {rate}"] = shown(f"2 hosts at {rate}", before, samples)
    if options.json:
        write(options.json, options, {"results": results})


if __name__ == "__main__":
    main()
