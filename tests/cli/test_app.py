import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from distopt.cli.app import app
from distopt.version import __version__

WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_the_extra_the_command_says_how_to_get_it(warm_python, package):
    ran = warm_python.run(WITHOUT.format(package=package) + "from distopt.cli import main; main()", "info")
    assert ran.returncode == 1
    assert f"needs '{package}', which is not installed" in ran.stderr
    assert 'pip install "torch-distopt[cli]"' in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_bug_is_not_mistaken_for_a_missing_extra(warm_python):
    ran = warm_python.run("from distopt.cli import main; print('main')" + WITHOUT.format(package="distopt") + "main()")
    assert ran.stdout.strip() == "main"
    assert "Traceback" in ran.stderr
    assert "is not installed" not in ran.stderr


def test_compare_without_matplotlib_says_so_before_it_trains(warm_python, tmp_path):
    ran = warm_python.run(
        WITHOUT.format(package="matplotlib") + "from distopt.cli import main; main()", "compare", cwd=tmp_path
    )
    assert ran.returncode != 0
    assert "the plot needs matplotlib, which is not installed" in ran.stderr
    assert "started" not in ran.stdout
    assert not list(tmp_path.iterdir())


def test_importing_distopt_imports_nothing_of_the_command_line(warm_python):
    heavy = "{'typer', 'click', 'rich', 'matplotlib', 'sklearn', 'tensorboard'}"
    ran = warm_python.run(f"import sys, distopt; print({heavy} & set(sys.modules))")
    assert ran.stdout.strip() == "set()", ran.stdout + ran.stderr


@pytest.mark.parametrize(
    "command", [[], ["info"], ["compare"], ["link"], ["plan-code"], ["topology"], ["simulate"], ["doctor"], ["job"]]
)
def test_help_explains_every_option(command):
    ran = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, [*command, "--help"])
    assert ran.exit_code == 0, ran.output
    import typer.main

    group = typer.main.get_command(app)
    for parameter in (group.commands[command[0]] if command else group).params:
        assert parameter.opts[0] in ran.output
        assert parameter.help or parameter.name == "help", f"{parameter.name} has no help"


def test_version():
    ran = CliRunner().invoke(app, ["--version"])
    assert (ran.exit_code, ran.output.strip()) == (0, __version__)


def test_info_as_json_says_what_is_found():
    ran = CliRunner().invoke(app, ["info", "--json"])
    found = json.loads(ran.output)
    assert found["torch"] == torch.__version__
    assert found["distopt"] == __version__
    assert found["native_kernels"] == (found["kernels"] != "reference")
    assert set(found["hosts"]) == {"deepspeed", "accelerate", "lightning", "flwr"}
    assert found["distributed"]["gloo"] is True


def test_info_for_a_person_names_each_part():
    ran = CliRunner().invoke(app, ["info"])
    assert ran.exit_code == 0
    for part in ("distopt", "torch", "native kernels", "CUDA", "MPI", "deepspeed", "flwr"):
        assert part in ran.output


def test_info_imports_no_host(monkeypatch):
    for name in ("deepspeed", "accelerate", "lightning", "flwr", "mpi4py"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it would now raise
    assert CliRunner().invoke(app, ["info", "--json"]).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--ranks", "0"], ["--ranks"]),
        (["--model", "transformer"], ["--model", "transformer", "cnn", "mlp"]),
        (["--values", "int3"], ["--values", "fp32"]),
        (["--steps", "-1"], ["--steps"]),
    ],
)
def test_a_bad_option_is_a_usage_error_that_names_it(arguments, parts):
    ran = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, ["compare", *arguments])
    assert ran.exit_code == 2
    for part in parts:
        assert part in ran.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "the data must be a folder with train-images-idx"),
        (["--data", "digits", "--density", "2"], "density must be a number in (0, 1], got 2"),
    ],
)
def test_a_bad_value_is_one_line_before_any_rank_starts(warm_python, tmp_path, arguments, message):
    code = "from distopt.cli import main; main()"
    ran = warm_python.run(code, "compare", *arguments, "--out", str(tmp_path / "out"))
    assert ran.returncode == 1
    assert ran.stderr.startswith(f"distopt: {message}"), ran.stderr
    assert "Traceback" not in ran.stderr
    assert not (tmp_path / "out").exists()
