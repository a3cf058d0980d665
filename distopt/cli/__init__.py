"""The `distopt` command: `distopt job`, `distopt doctor`, `distopt compare`, `distopt link` and others; see --help.

Nothing here is imported by the rest of the package, and nothing heavy is imported before a command runs, so that
`import distopt` never needs typer or rich. They are the extra `cli`.
"""

import sys

_EXTRA = frozenset({"typer", "click", "rich", "matplotlib", "sklearn"})


def main() -> None:
    """Runs the command line; without the extra `cli`, says how to install it and exits with 1."""
    try:
        from distopt.cli.app import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRA:
            raise
        print(
            f"distopt: the command line needs {error.name!r}, which is not installed; "
            'install it with: pip install "torch-distopt[cli]"',
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    run()
