"""Draws one step of a trace that benchmarks/link.py --profile wrote: what runs when, and what hides behind what.

    python benchmarks/link_timeline.py runs/link/trace-mlp-2-1gbit.json --plot benchmarks/results/link-timeline.png

One row per kind of work; a step is from the beginning of one forward pass to that of the next. Chrome's tracing page
and Perfetto open the trace itself.
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

FORWARD = "DistributedDataParallel.forward"
ROWS = {
    "forward": (FORWARD,),
    "backward": ("autograd::engine::evaluate_function",),
    "select": ("distopt::ddp::select",),
    "all-gather": ("gloo:",),
    "decode": ("distopt::ddp::decode",),
    "optimizer": ("Optimizer.step",),
}
COLOURS = ("#8da0cb", "#66c2a5", "#fc8d62", "#e78ac3", "#a6d854", "#b3b3b3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--step", type=int, default=3, help="which of the profiled steps")
    parser.add_argument("--plot", type=Path, required=True)
    options = parser.parse_args()
    events = [event for event in json.loads(options.trace.read_text())["traceEvents"] if event.get("ph") == "X"]
    starts = sorted(event["ts"] for event in events if event["name"] == FORWARD)
    if options.step + 1 >= len(starts):
        parser.error(f"--step must be in [0, {len(starts) - 2}], got {options.step}")
    begin, end = starts[options.step : options.step + 2]
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    axes = figure.add_subplot()
    for row, ((label, names), colour) in enumerate(zip(ROWS.items(), COLOURS, strict=True)):
        spans = [
            ((event["ts"] - begin) / 1e3, event["dur"] / 1e3)
            for event in events
            if event["name"].startswith(names)
            and begin <= event["ts"] < end
            # AccumulateGrad is where DDP calls the hook: that time is select's
            and not (label == "backward" and "AccumulateGrad" in event["name"])
        ]
        axes.broken_barh(spans, (row - 0.4, 0.8), color=colour)
    axes.set_yticks(range(len(ROWS)), list(ROWS))
    axes.invert_yaxis()
    axes.set_xlabel(f"ms of one step of rank 0 ({options.trace.stem.removeprefix('trace-')}, under the profiler)")
    axes.set_xlim(0, (end - begin) / 1e3)
    options.plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.plot, dpi=110)
    print(f"wrote {options.plot}")


if __name__ == "__main__":
    main()
