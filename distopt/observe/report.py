"""The text at the end of a run: what was sent, where the time went, and what to look at."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from distopt.coding.report import as_text
from distopt.observe.lines import Line
from distopt.observe.run import RankRun

_NOTABLE = 0.1  # of a step: a rank that waits so much less than the others is told of
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def report(lines: Mapping[int, Sequence[Line]]) -> str:
    """The report of a run.

    Args:
        lines: Of each rank that is known, at least one.
    """
    runs = {rank: RankRun(each) for rank, each in sorted(lines.items())}
    rank, first = next(iter(runs.items()))
    texts = list(_FAMILIES.get(first.family, _other)(first))
    head = f"distopt, {first.family}, {'rank' if len(runs) == 1 else 'ranks'} {', '.join(map(str, runs))}"
    if len(runs) > 1:
        head += f"; figures of rank {rank}"
        texts += _slowest(runs)
    if first.is_resumed:
        texts.append("The run was resumed: counts are those of all its parts, as far as the lines go.")
    if first.values:
        texts.append("Noted last: " + ", ".join(f"{name} {value:.6g}" for name, value in first.values.items()))
    return "\n".join([head, *texts])


def _ddp(run: RankRun) -> Iterator[str]:
    stats = run.last
    yield _steps(run, f"{stats['algorithm']} on {stats['world_size']} ranks, {stats['backend']} kernels")
    yield from _bytes(run)
    yield from _shares(
        run,
        ("selecting", "seconds_selecting"),
        ("communicating (behind the backward pass where it overlaps)", "seconds_communicating"),
        ("decoding", "seconds_decoding"),
    )
    routes = stats.get("routes", {})
    for name, route in routes.items():
        predicted = route["predicted_s"]
        told = "" if predicted is None else f", {1e3 * predicted:.2f} ms predicted"
        yield f"Route {name}: {route['buckets']} buckets, {1e3 * route['measured_s']:.2f} ms each{told}"
    if skipped := int(run.total("skipped_steps")):
        yield f"Warning: {skipped} steps were left out, because a gradient was not finite or a rank was lost."
    if lost := stats.get("heartbeat", {}).get("lost_ranks"):
        yield f"Warning: lost ranks: {', '.join(map(str, lost))}."
    if stats.get("paused"):
        yield "Compression was paused at the end."
    yield from _did_it_pay(run)


def _did_it_pay(run: RankRun) -> Iterator[str]:
    """Only what the numbers prove: what a dense exchange would have taken is known from above alone."""
    if run.last["algorithm"] == "dense":
        return
    sent, dense = run.total("link_bytes_sent"), run.total("link_bytes_dense")
    if sent > dense > 0:
        yield (
            f"Warning: compression did not pay here: with {run.last['world_size']} ranks it put {sent / dense:.1f}x of "
            "the dense bytes on the link; lower the density, or use Dense."
        )
        return
    selecting, communicating, decoding = (
        run.per_step(f"seconds_{phase}") or 0.0 for phase in ("selecting", "communicating", "decoding")
    )
    # At the rate that the link has shown at least, latencies and waiting for others included.
    dense_at_most = communicating * dense / sent if sent else 0.0
    if 0.0 < dense_at_most < selecting + communicating + decoding:
        yield (
            f"Warning: compression did not pay here: a dense exchange would have taken at most "
            f"{1e3 * dense_at_most:.1f} ms per step, this one takes {1e3 * (selecting + communicating + decoding):.1f} "
            "ms; lower the density, or use Dense."
        )
    dense_buckets, sparse_buckets = run.total("buckets_dense"), run.total("buckets_sparse")
    if dense_buckets and not sparse_buckets:
        yield "Every bucket was sent whole: nothing was compressed."


def _gossip(run: RankRun) -> Iterator[str]:
    stats = run.last
    yield _steps(run, f"{stats['mixing']} on {stats['topology']} with {len(stats['members'])} ranks")
    passed = int(run.total("passed"))
    yield f"{int(run.total('exchanges'))} exchanges; {passed} steps passed, as the one before was still under way"
    sent, dense = run.total("bytes_sent"), run.total("bytes_dense")
    yield f"Sent {_size(sent)}, {_ratio(sent, dense)} the parameters in fp32, once for each exchange ({_size(dense)})"
    yield from _shares(run, ("exchanging (behind the computation where it overlaps)", "seconds_exchanging"))
    if stats.get("variance_ratio") is not None:
        yield f"The last average left {stats['variance_ratio']:.3g} of a tensor's variance, at the least"
    if stats["lost"]:
        yield f"Warning: lost ranks: {', '.join(map(str, stats['lost']))}."
    if stats["joined"]:
        yield f"Joined later: {', '.join(map(str, stats['joined']))}"


def _local(run: RankRun) -> Iterator[str]:
    stats = run.last
    yield _steps(run, f"{stats['algorithm']} with {len(stats['members'])} ranks, outer_lr {stats['outer_lr']:g}")
    yield f"{int(run.total('exchanges'))} exchanges, {int(run.total('rounds'))} rounds complete"
    sent, dense = run.total("bytes_sent"), run.total("bytes_dense")
    yield f"Sent {_size(sent)}, {_ratio(sent, dense)} the same parameters in fp32 ({_size(dense)})"
    yield f"On the link: {_size(run.total('link_bytes_sent'))}, to all the others"
    yield from _shares(
        run,
        ("selecting and encoding", "seconds_selecting"),
        ("waiting for exchanges", "seconds_exchanging"),
        ("exchanges behind the computation", "seconds_hidden"),
    )
    if restarts := int(run.total("restarts")):
        yield f"Warning: this rank has missed exchanges {restarts} times, and took the others' model."
    if stats["lost"]:
        yield f"Warning: lost ranks: {', '.join(map(str, stats['lost']))}."
    if stats["joined"]:
        yield f"Joined later: {', '.join(map(str, stats['joined']))}"


def _batch(run: RankRun) -> Iterator[str]:
    stats = run.last
    yield _steps(run, f"adaptive batch, {stats['test']} test, beside {stats['beside'] or 'nothing'}")
    yield (
        f"The batch grew {stats['grown']} times, from {stats['start_batch']} to {stats['batch_size']} samples (of at "
        f"most {stats['max_batch']}): {stats['accumulation']} micro-batches of {stats['micro_batch']} on each rank"
    )
    scale = stats["noise_scale"]
    told = "" if scale is None else f", noise scale {scale:.4g} samples at the end"
    yield f"{stats['samples']} samples, {stats['tests']} tests{told}"
    fixed = stats["samples"] / stats["start_batch"]
    yield f"A batch of {stats['start_batch']} would have taken {fixed:.0f} steps for these samples"
    yield from _shares(run, ("testing", "seconds_testing"))
    if stats["dropped"]:
        yield f"{stats['dropped']} tests were dropped: a gradient was not finite, or no noise was to be seen."


def _coding(run: RankRun) -> Iterator[str]:
    stats = run.last
    scheme = "(".join((stats["algorithm"], ", ".join(f"{key}={value}" for key, value in stats["scheme"].items()))) + ")"
    if "workers" not in stats:
        yield _steps(run, f"{scheme}, a worker: {int(run.total('skipped'))} rounds skipped")
        yield from _shares(run, ("computing what the master asked for", "compute_s"))
        return
    yield _steps(run, f"{scheme}, {stats['role']}")
    yield from _shares(run, ("rounds, from the first task to the answer that was enough", "waited_s"))
    gone = {int(worker): reason for worker, reason in stats["gone"].items()}
    yield as_text({**stats, "gone": gone}, scheme)
    if gone:
        yield f"Warning: {len(gone)} workers are gone."


def _federated(run: RankRun) -> Iterator[str]:
    """Of rows of a history, which are of one round each."""
    rows = [line["stats"] for line in run.lines]
    clients = sum(len(row["participants"]) for row in rows) / len(rows)
    yield f"{len(rows)} rounds, up to round {run.last_step}; {clients:.1f} clients in a round"
    down, up = (sum(row[f"bytes_{way}"] for row in rows) for way in ("down", "up"))
    yield f"Sent down {_size(down)}, up {_size(up)}"
    if per_round := run.per_step():
        yield f"{1e3 * per_round:.1f} ms for a round" + (
            f", {run.last['time_s']:.1f} s of virtual time" if "time_s" in run.last else ""
        )
    plain = {"round", "participants", "bytes_down", "bytes_up", "refused", "time_s"}
    if found := {name: value for name, value in run.last.items() if name not in plain and isinstance(value, float)}:
        yield "At the end: " + ", ".join(f"{name} {value:.6g}" for name, value in found.items())
    if refused := sum(row["refused"] for row in rows):
        yield f"Warning: {refused} replies did not count."


def _other(run: RankRun) -> Iterator[str]:
    yield _steps(run, str(run.last.get("algorithm", "")))
    yield from _bytes(run)


_FAMILIES: dict[str, Callable[[RankRun], Iterator[str]]] = {
    "ddp": _ddp, "gossip": _gossip, "local": _local, "coding": _coding, "federated": _federated, "batch": _batch,
}  # fmt: skip


def _steps(run: RankRun, what: str) -> str:
    per_step = run.per_step()
    told = "" if per_step is None else f", {1e3 * per_step:.1f} ms each"
    return f"{what}: {int(run.total('steps'))} steps{told}, up to step {run.last_step}"


def _bytes(run: RankRun) -> Iterator[str]:
    for where, sent, dense in (
        ("Sent", run.total("bytes_sent"), run.total("bytes_dense")),
        ("On the link", run.total("link_bytes_sent"), run.total("link_bytes_dense")),
    ):
        if dense:
            yield f"{where}: {_size(sent)}, {_ratio(sent, dense)} dense fp32 ({_size(dense)})"


def _shares(run: RankRun, *phases: tuple[str, str]) -> Iterator[str]:
    """Where a step's time went; phases may overlap with the computation, and so with each other."""
    step = run.per_step()
    if not step:
        return
    yield f"Of a step of {1e3 * step:.1f} ms:"
    for told, name in phases:
        seconds = run.per_step(name) or 0.0
        yield f"  {1e3 * seconds:8.2f} ms {seconds / step:5.0%}  {told}"


_WAITING = {"ddp": "seconds_communicating", "gossip": "seconds_exchanging", "local": "seconds_exchanging"}


def _slowest(runs: Mapping[int, RankRun]) -> Iterator[str]:
    """Who the others wait for: the rank that takes longest or, where all take as long, the one that waits least."""
    yield f"{'rank':>6} {'steps':>8} {'ms per step':>12} {'waiting':>10}"
    steps: dict[int, float] = {}
    waits: dict[int, float] = {}
    for rank, run in runs.items():
        step = run.per_step()
        name = _WAITING.get(run.family)
        wait = None if name is None else run.per_step(name)
        told = ["" if each is None else f"{1e3 * each:.2f}" for each in (step, wait)]
        yield f"{rank:>6} {int(run.total('steps')):>8} {told[0]:>12} {told[1]:>10}"
        if step is not None:
            steps[rank] = step
        if wait is not None:
            waits[rank] = wait
    if len(steps) < 2:
        return
    slow, fast = max(steps, key=lambda r: steps[r]), min(steps, key=lambda r: steps[r])
    if steps[slow] > (1 + _NOTABLE) * steps[fast]:
        yield f"Slowest: rank {slow}, {steps[slow] / steps[fast]:.2f}x the time of rank {fast} per step."
        return
    if len(waits) == len(steps):
        slow, fast = min(waits, key=lambda r: waits[r]), max(waits, key=lambda r: waits[r])
        if waits[fast] - waits[slow] > _NOTABLE * steps[slow]:
            yield (
                f"Slowest: rank {slow}, which waits least; rank {fast} waits "
                f"{1e3 * (waits[fast] - waits[slow]):.1f} ms longer in each step."
            )
            return
    yield "All ranks are about as fast as each other."


def _size(count: float) -> str:
    for unit, name in _UNITS:
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count:.0f} bytes"


def _ratio(sent: float, dense: float) -> str:
    if not sent or not dense:
        return "in place of"
    return f"{dense / sent:,.1f} times less than" if dense >= sent else f"{sent / dense:,.1f} times as much as"
