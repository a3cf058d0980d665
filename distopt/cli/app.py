"""The commands and their options."""

import json
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer import Argument, Option

from distopt import observe, plotting
from distopt.cli import compare as comparison
from distopt.cli import (
    datasets,
    doctor,
    info,
    machine,
    plan_code,
    ranks,
    report,
    simulate_config,
    simulate_report,
    topology_drawing,
)
from distopt.cli import describe_job as job_files
from distopt.cli import link as links
from distopt.cli import simulate as simulation
from distopt.cli import topology as topologies
from distopt.cli.progress import show_progress
from distopt.comm import Link
from distopt.errors import ConfigError, DistoptError, PeerLostError
from distopt.job import Job
from distopt.version import __version__

app = typer.Typer(
    help="Train over slow, uneven or unreliable networks with stock PyTorch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Model(StrEnum):
    """Models to compare on."""

    cnn = "cnn"
    mlp = "mlp"


class Values(StrEnum):
    """Types of values on the wire."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


class Indices(StrEnum):
    """Encodings of indices on the wire."""

    int32 = "int32"
    block16 = "block16"
    elias_fano = "elias-fano"


class Stop(StrEnum):
    """When a round of coded training ends."""

    decodable = "decodable"
    minimal = "minimal"
    paper = "paper"


def run() -> None:
    """Runs the command line; an error of distopt's is one message and exit code 1, not a traceback."""
    try:
        app()
    except DistoptError as error:
        print(f"distopt: {error}", file=sys.stderr)
        raise SystemExit(1) from None


@app.callback(invoke_without_command=True)
def top(version: Annotated[bool, Option("--version", help="Print the version and exit.")] = False) -> None:
    """Train over slow, uneven or unreliable networks with stock PyTorch."""
    if version:
        print(__version__)
        raise typer.Exit


@app.command(name="info")
def show_info(
    as_json: Annotated[bool, Option("--json", help="Print JSON, for programs and bug reports.")] = False,
) -> None:
    """Say what is built and found: torch, native kernels and their CPU path, CUDA, MPI, hosts."""
    found = info.collect()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    grid = Table.grid(padding=(0, 2))
    for name, value in info.rows(found):
        grid.add_row(name, value)
    _console().print(grid, highlight=False)


@app.command()
def compare(
    context: typer.Context,
    model: Annotated[
        Model, Option(help="Model to train: a small convolutional net or a multi-layer perceptron.")
    ] = Model.cnn,
    data: Annotated[
        str | None,
        Option(
            help="Folder of IDX files (train-images, train-labels, t10k-images, t10k-labels; gzipped or not), "
            "'fashion-mnist' for Debian's, or 'digits' for scikit-learn's. Default: Debian's Fashion-MNIST where it is "
            "installed, else digits.",
            show_default=False,
        ),
    ] = None,
    ranks: Annotated[int, Option(min=1, help="Processes under torchrun; each uses one thread.")] = 2,
    epochs: Annotated[
        int | None,
        Option(min=1, help="Length of each run. Default: 4, for fewer than 10,000 images 40.", show_default=False),
    ] = None,
    steps: Annotated[int | None, Option(min=1, help="Length of each run in steps, in place of --epochs.")] = None,
    batch: Annotated[int, Option(min=1, help="Images per rank and step.")] = 32,
    lr: Annotated[float, Option(min=0.0, help="Learning rate at the start; falls to 0 along a cosine.")] = 0.05,
    momentum: Annotated[
        float, Option(min=0.0, help="Momentum of SGD; DGC takes it over, top-k leaves it in SGD.")
    ] = 0.9,
    weight_decay: Annotated[float, Option(min=0.0, help="Weight decay of SGD.")] = 5e-4,
    seed: Annotated[int, Option(min=0, help="Seed of the weights and of the data's order, the same for all runs.")] = 0,
    density: Annotated[float, Option(help="Part of the gradient that top-k and DGC send, in (0, 1].")] = 1e-3,
    warmup_stage: Annotated[
        int | None,
        Option(
            min=0,
            help="Steps of each of the four warm-up stages (25%, 6.25%, 1.6%, 0.4%); 0 for no warm-up. "
            "Default: 1% of all steps.",
            show_default=False,
        ),
    ] = None,
    values: Annotated[Values, Option(help="Type of the values on the wire.")] = Values.fp32,
    indices: Annotated[Indices, Option(help="Encoding of the indices on the wire.")] = Indices.int32,
    config: Annotated[
        Path | None,
        Option(
            help="A job's file (distopt.toml): its algorithm is one of the runs, and the others compress as it does. "
            "In place of --density, --warmup-stage, --values and --indices; its other tables are not used.",
            show_default=False,
        ),
    ] = None,
    deadline: Annotated[
        float, Option(min=1.0, help="Seconds after which all runs are stopped and count as failed.")
    ] = 600.0,
    out: Annotated[Path, Option(help="Folder for the table's figures (JSON), the plot (PNG) and the logs.")] = Path(
        "runs/compare"
    ),
) -> None:
    """Train one model three times by the same steps: dense DDP, top-k with error feedback, DGC. Compare.

    Ends with a table, a plot (accuracy over steps and over bytes) and a JSON file.
    """
    settings = comparison.Settings(
        model=model,
        data=data,
        ranks=ranks,
        epochs=epochs,
        steps=steps,
        batch=batch,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        seed=seed,
        density=density,
        warmup_stage=warmup_stage,
        values=values,
        indices=indices,
        config=_compared(config, context),
    )
    console = _console()
    # Both here first, so that what is missing is one clear error before any rank starts.
    plotting.load_matplotlib()
    loaded = datasets.load(data)
    jobs = settings.jobs(loaded)
    num_steps = settings.steps_for(loaded)
    title = f"{loaded.name}, {model}, {ranks} ranks, {num_steps} steps of {ranks} x {batch} images"
    console.print(f"{title}; {settings.compression}", highlight=False)
    with show_progress(console, list(jobs), num_steps) as show:
        results = comparison.run(jobs, out, deadline_s=deadline, show=show)
    content = {
        "command": "distopt compare",
        "data": loaded.name,
        "machine": machine.machine(),
        "versions": machine.versions(),
        "settings": asdict(settings) | {"steps": num_steps},
        "results": results,
    }
    report.write_json(content, out / "compare.json")
    console.print(report.table(results, title))
    console.print(report.notes(results), highlight=False)
    report.plot(results, out / "compare.png", title)
    console.print(f"Plot: {out / 'compare.png'}\nFigures: {out / 'compare.json'}", highlight=False)


@app.command(name="link")
def measure_link(
    parameters: Annotated[int, Option(min=1, help="Parameters of the model to advise for.")] = 25_557_032,
    density: Annotated[float, Option(help="Part of the gradient to send, in (0, 1].")] = 1e-3,
    ranks: Annotated[
        int | None,
        Option(min=2, help="Ranks to advise for. Default: those that measure.", show_default=False),
    ] = None,
    latency: Annotated[
        float | None,
        Option(help="Seconds of one message: with --bandwidth, a link that is given.", show_default=False),
    ] = None,
    bandwidth: Annotated[
        float | None, Option(help="Bytes per second that one rank sends, as --latency.", show_default=False)
    ] = None,
    values: Annotated[Values, Option(help="Type of the values on the wire.")] = Values.fp32,
    indices: Annotated[Indices, Option(help="Encoding of the indices on the wire.")] = Indices.int32,
    step_seconds: Annotated[
        float | None,
        Option(
            help="Seconds of a step without any exchange: also say how many local steps suit the link.",
            show_default=False,
        ),
    ] = None,
    share: Annotated[
        float | None,
        Option(
            help="Part of the time that ranks shall compute, with --step-seconds. Default: 0.95.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None, Option(help="Folder for the figures (JSON) and the plot (PNG).", show_default=False)
    ] = None,
) -> None:
    """Measure the link between the ranks of a job, and say which exchange pays on it, and from which density on.

    Start it as the job is started: torchrun ... -m distopt.cli link
    """
    if (latency is None) != (bandwidth is None):
        raise ConfigError("--latency and --bandwidth must be given together, got one of them; give both or none")
    if share is not None and step_seconds is None:
        raise ConfigError(f"--share needs the length of a step, got {share} alone; give --step-seconds too")
    given = None if latency is None or bandwidth is None else Link(latency_s=latency, bandwidth=bandwidth)
    question = links.Question(
        parameters=parameters, density=density, ranks=ranks, link=given, values=values, indices=indices,
        step_seconds=step_seconds, share=0.95 if share is None else share,
    )  # fmt: skip
    if out is not None:
        plotting.load_matplotlib()
    found = links.answer(question)
    if found is None:
        return
    console = _console()
    console.print(links.table(found))
    console.print(links.advice(found), highlight=False)
    if found["local"]:
        console.print(links.local_table(found))
        console.print(links.local_advice(found), highlight=False)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        content = {"machine": machine.machine(), "versions": machine.versions(), **found}
        report.write_json(content, out / "link.json")
        links.plot(found, out / "link.png")
        console.print(f"Plot: {out / 'link.png'}\nFigures: {out / 'link.json'}", highlight=False)


@app.command(name="plan-code")
def plan_coding(
    trace: Annotated[
        Path,
        Argument(
            help="CSV or JSON of the seconds that each worker took in each round: one line per round and one column "
            "per worker, or lines of round,worker,seconds[,compute_s].",
            show_default=False,
        ),
    ],
    load: Annotated[
        float | None,
        Option(
            help="Fraction of the whole data that a worker computed per round: 1/n if uncoded. Default: what the trace "
            "says in a line '# load = ...'.",
            show_default=False,
        ),
    ] = None,
    seconds_per_load: Annotated[
        float | None,
        Option(
            help="Seconds that one worker would take for the whole data. Default: what the trace says, or the median "
            "of its compute times over the load.",
            show_default=False,
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        Option(min=1, help="Gradients to compute. Default: as many as the trace has rounds.", show_default=False),
    ] = None,
    stop: Annotated[
        Stop,
        Option(
            help="When a round ends: as soon as what is due decodes, as soon as the stragglers are within the model, "
            "or by the rule of the paper."
        ),
    ] = Stop.decodable,
    top: Annotated[int, Option(min=1, help="How many schemes to show.")] = 10,
    only_live: Annotated[
        bool, Option("--only-live", help="Only schemes that train one model without a delayed gradient.")
    ] = False,
    out: Annotated[
        Path | None, Option(help="Folder for the figures (JSON) and the plot (PNG).", show_default=False)
    ] = None,
) -> None:
    """Simulate coded training on a trace of round times, and say which code is fastest and how to configure it.

    Of schemes that are as fast as the fastest, to 0.2%, the simplest comes first.
    """
    if out is not None:
        plotting.load_matplotlib()
    question = plan_code.Question(
        trace=trace, load=load, seconds_per_load=seconds_per_load, jobs=jobs, stop=stop, only_live=only_live
    )
    found = plan_code.answer(question)
    console = _console()
    console.print(plan_code.table(found, top))
    console.print(plan_code.advice(found), highlight=False, soft_wrap=True)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        content = {
            "command": "distopt plan-code",
            "machine": machine.machine(),
            "versions": machine.versions(),
            **found,
        }
        report.write_json(content, out / "plan-code.json")
        plan_code.plot(found, top, out / "plan-code.png")
        console.print(f"Plot: {out / 'plan-code.png'}\nFigures: {out / 'plan-code.json'}", highlight=False)


@app.command(name="topology")
def describe_topology(
    names: Annotated[
        list[str] | None,
        Argument(
            help="Topologies: ring, torus, star, complete, exponential, one-peer-exponential, random-matchings, "
            "random-regular, erdos-renyi, scale-free. Default: all of them, unless --edges is given.",
            show_default=False,
        ),
    ] = None,
    ranks: Annotated[
        int | None,
        Option(min=1, max=4096, help="Ranks of the job. Default: as many as --edges has, else 8.", show_default=False),
    ] = None,
    option: Annotated[
        list[str] | None,
        Option(
            help="A setting of a topology, as rows=2 of torus, degree=3 of random-regular, of=ring of "
            "random-matchings; may be given several times.",
            show_default=False,
        ),
    ] = None,
    edges: Annotated[
        Path | None,
        Option(help="File of a graph of your own: two ranks in each line, counted from 0.", show_default=False),
    ] = None,
    directed: Annotated[
        bool, Option("--directed", help="The pairs of --edges are sender and receiver, for push-sum.")
    ] = False,
    parameters: Annotated[int, Option(min=1, help="Parameters of the model that is exchanged.")] = 25_557_032,
    values: Annotated[Values, Option(help="Type of the parameters.")] = Values.fp32,
    draw: Annotated[
        Path | None, Option(help="File for a picture: PNG, SVG or PDF by its ending.", show_default=False)
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON, weights included, and nothing else.")] = False,
) -> None:
    """Say how fast ranks agree that average with their neighbours only, and what it costs; draw who talks to whom.

    One topology is shown with its picture, several are compared.
    """
    if draw is not None:
        plotting.load_matplotlib()
    question = topologies.Question(
        names=tuple(names or ()),
        options=tuple(option or ()),
        edges=edges,
        directed=directed,
        ranks=ranks,
        parameters=parameters,
        bytes_per_parameter=4 if values == Values.fp32 else 2,
    )
    found = topologies.answer(question)
    if draw is not None:
        topology_drawing.plot(found, draw)
    if as_json:
        print(json.dumps([topologies.plain(each) for each in found]))
        return
    console = _console()
    if len(found) == 1:
        console.print(topologies.single(found[0], question))
        console.print(topology_drawing.text(found[0], braille=console.encoding.startswith("utf")), highlight=False)
    else:
        console.print(topologies.comparison(found, question))
    if said := topologies.advice(found):
        console.print(said, highlight=False, soft_wrap=True)
    if draw is not None:
        console.print(f"Picture: {draw}", highlight=False)


@app.command(name="job")
def describe_job(
    config: Annotated[Path, Argument(help="File that describes the job: TOML, or JSON with the same keys.")] = Path(
        "distopt.toml"
    ),
    init: Annotated[bool, Option("--init", help="Write a commented file to CONFIG and exit.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Say what a job's file means (algorithm, checkpoints, log), or what is wrong with it; or write one to begin with.

    Exit status: 0 if the file is right, 1 if it is not.
    """
    if init:
        _write_new(config, job_files.default_text(), "see what it means with: distopt job")
        return
    found = job_files.describe(config)
    if as_json:
        print(json.dumps(found))
        return
    console = _console()
    console.print(job_files.table(found))
    console.print(job_files.lines(found), highlight=False, soft_wrap=True)


@app.command(name="doctor")
def run_doctor(
    deadline: Annotated[
        float,
        Option(min=5.0, help="Seconds until there is an answer, whoever is missing; ranks may take half to come."),
    ] = 60.0,
    as_json: Annotated[bool, Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Examine the hosts of a job: versions, addresses, who reaches whom, rates and latencies, clocks, memory, cores.

    Start it as the job is started (torchrun ... -m distopt.cli doctor, or by mpirun); where hosts cannot even meet,
    once on each host with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set. Exit status: 0 if nothing will break the
    job, 1 with a problem, 2 if not every rank could be examined.
    """
    try:
        with doctor.ends_by(deadline, status=2):
            found = doctor.examine(deadline)
    except PeerLostError as error:
        print(f"distopt: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    if as_json and "ranks" in found:
        print(json.dumps(found))
    elif "ranks" in found:
        console = _console()
        for part in doctor.show(found):
            console.print(part, highlight=False, soft_wrap=True)
    raise typer.Exit(doctor.status(found["findings"]))


@app.command()
def simulate(
    config: Annotated[
        Path | None,
        Argument(help="TOML file that describes the job; --init writes a commented one.", show_default=False),
    ] = None,
    init: Annotated[
        bool, Option("--init", help="Write the default file to CONFIG, or print it where no CONFIG is given, and exit.")
    ] = False,
    restart: Annotated[
        bool, Option("--restart", help="Start at round 1, also where the folder has a checkpoint of this job.")
    ] = False,
    out: Annotated[
        Path | None,
        Option(help="Folder for everything that the job leaves, in place of the file's.", show_default=False),
    ] = None,
) -> None:
    """Simulate a federated job: clients that keep their data, come and go, and a server that averages.

    Ends with a table, the history (CSV, JSON), a plot and a summary; goes on from its checkpoint if there is one. With
    torchrun ... -m distopt.cli simulate CONFIG the ranks share the clients.
    """
    if init:
        if config is None:
            print(simulate_config.default_text(), end="")
        else:
            _write_new(config, simulate_config.default_text(), "run it with: distopt simulate")
        return
    if config is None:
        raise ConfigError("CONFIG must be a TOML file, got none; distopt simulate --init job.toml writes a default")
    plotting.load_matplotlib()  # first, so that what is missing is one clear error before anything runs
    settings = simulate_config.read(config)
    with ranks.joined() as rank:
        console = _console() if rank == 0 else Console(quiet=True)
        folder = out or Path(settings.output.folder)
        job, history = simulation.run(settings, folder, console, restart=restart)
    if rank != 0:
        return
    found = simulate_report.summary(history, job.simulation.refused, settings.output.target)
    console.print(simulate_report.table(history))
    console.print(simulate_report.lines(found, job.simulation.clients.num_clients), highlight=False, soft_wrap=True)
    paths = simulate_report.write(job, history, found)
    console.print("Written: " + " ".join(map(str, paths)), highlight=False, soft_wrap=True)


@app.command(name="report")
def read_report(
    folder: Annotated[Path, Argument(help="Folder of the job's log, which holds stats-0.jsonl.", show_default=False)],
) -> None:
    """Print what the logs of a job's ranks say: steps, bytes, where the time went, who was slow, what to look at."""
    print(observe.report(observe.read_folder(folder)))


def _compared(config: Path | None, context: typer.Context) -> dict[str, Any] | None:
    """The algorithm of a job's file, which says alone what options say otherwise."""
    if config is None:
        return None
    algorithm = Job.load(config).algorithm
    given = [
        "--" + name.replace("_", "-")
        for name in ("density", "warmup_stage", "values", "indices")
        if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    ]
    if given:
        raise ConfigError(
            f"{config} says how the runs compress, got {', '.join(given)} beside it; change it in the file, or leave "
            "--config out"
        )
    return algorithm.to_dict()


def _write_new(path: Path, text: str, then: str) -> None:
    if path.exists():
        raise ConfigError(f"{path} must not exist yet, or --init would replace it; give another name")
    path.write_text(text)
    print(f"{path} is written; {then} {path}")


def _console() -> Console:
    """Standard output; a pipe or a log has no width of its own, and a table must not wrap there."""
    console = Console()
    return console if console.is_terminal else Console(width=120)
