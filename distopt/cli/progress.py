"""How a run is shown while it goes on: a bar on a terminal, plain lines elsewhere (a log, a pipe, CI)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from distopt.cli.job import Event

Show = Callable[[Event], None]


@contextmanager
def show_progress(console: Console, labels: list[str], steps: int) -> Iterator[Show]:
    """Gives a function that shows events of runs of `steps` steps each."""
    if not console.is_terminal:
        yield lambda event: _print_line(console, event, steps)
        return
    columns = [
        TextColumn("{task.description:24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[accuracy]}"),
    ]
    with Progress(*columns, console=console) as bars:
        tasks = {label: bars.add_task(label, total=steps, start=False, accuracy="") for label in labels}

        def show(event: Event) -> None:
            if event["event"] == "started":
                bars.start_task(tasks[event["label"]])
            elif event["event"] == "step":
                bars.update(tasks[event["label"]], completed=event["step"])
            elif event["event"] == "evaluated":
                accuracy = f"accuracy {event['accuracy']:.2%}"
                bars.update(tasks[event["label"]], completed=event["step"], accuracy=accuracy)

        yield show


def _print_line(console: Console, event: Event, steps: int) -> None:
    if event["event"] == "started":
        console.print(f"{event['label']}: started", highlight=False)
    elif event["event"] == "evaluated":
        line = f"{event['label']}: step {event['step']}/{steps}, accuracy {event['accuracy']:.2%}"
        console.print(line, highlight=False)
