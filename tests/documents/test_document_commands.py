"""Every command in a fenced block of a document is run by a test, or the table says why not."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import command_table
import document_blocks
import pytest
from command_table import By, Not, Options, Run
from document_blocks import ROOT, SHELL

DISTOPT = "from distopt.cli import main; main()"
SCRIPT = """
import os, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
WITHOUT_ENTRY = ("make", "pip")

BLOCKS = [block for page in document_blocks.pages() for block in document_blocks.blocks(page)]
COMMANDS = [(block, command) for block in BLOCKS if block.language in SHELL for command in block.commands]


def of_kind(kind):
    """The commands of which the table says this, once each."""
    found = [(block.page, text) for block, text in COMMANDS if isinstance(command_table.entry(text), kind)]
    return list(dict.fromkeys(found))


def starting_with(program):
    return sorted({text for _, text in COMMANDS if text.split()[0] == program})


def test_every_command_is_in_the_table():
    unknown = [f"{block}: {text}" for block, text in COMMANDS if text.split()[0] not in WITHOUT_ENTRY]
    unknown = [line for line in unknown if command_table.entry(line.split(": ", 1)[1]) is None]
    assert not unknown, "say in tests/documents/command_table.py how a test runs:\n" + "\n".join(unknown)


def test_nothing_in_the_table_is_of_no_document():
    texts = {text for _, text in COMMANDS}
    assert [each for each in command_table.TABLE if not any(re.fullmatch(each, text) for text in texts)] == []


def test_the_tests_that_the_table_names_exist():
    for said in command_table.TABLE.values():
        for test in said.tests if isinstance(said, By) else ():
            path, name = test.split("::")
            tree = ast.parse((ROOT / path).read_text())
            assert name in {each.name for each in tree.body if isinstance(each, ast.FunctionDef)}, test
        assert not isinstance(said, Options | Not) or said.why


def test_what_make_is_told_to_make_can_be_made():
    targets = {word for text in starting_with("make") for word in text.split()[1:] if "=" not in word}
    known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"test", "demo"} <= targets <= set(known), targets - set(known)


def test_what_pip_is_told_to_install_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in starting_with("pip"):
        for given in shlex.split(text)[2:]:
            for extra in re.findall(r"\[(.*)\]", given):
                assert set(extra.split(",")) <= set(project["optional-dependencies"]), text
            if match := re.match(r"([\w-]+)[^/]*$", given):
                assert match[1] in ("setuptools", "wheel", "torch", "numpy", project["name"]) or given[0] == "-", text


@pytest.mark.job
@pytest.mark.parametrize("page", sorted({page for page, _ in of_kind(Run)}))
def test_commands_run_as_they_stand(page, warm_python, tmp_path):
    for name, text in command_table.FILES.items():
        (tmp_path / name).write_text(text)
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    for _, command in filter(lambda pair: pair[0] == page, of_kind(Run)):
        words = shlex.split(command)
        if words[0] == "distopt":
            done = warm_python.run(DISTOPT, *words[1:], cwd=tmp_path, OMP_NUM_THREADS="1")
        elif shutil.which(words[0], path=path) or words[0] == "printf":
            done = subprocess.run(
                ["bash", "-c", command], cwd=tmp_path, env={**os.environ, "PATH": path}, stdin=subprocess.DEVNULL,
                capture_output=True, text=True, timeout=120, check=False,
            )  # fmt: skip
        else:
            pytest.skip(f"there is no {words[0]} here")
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


@pytest.mark.job
@pytest.mark.parametrize("program", sorted({re.search(r"\w+/\w+\.py", command)[0] for _, command in of_kind(Options)}))
def test_programs_that_take_long_start_and_know_their_options(program, warm_python):
    done = warm_python.run(SCRIPT, program, "--help", cwd=ROOT, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    for _, command in of_kind(Options):
        if program in command:
            given = re.findall(r"(?<=\s)--[\w-]+", command.partition(program)[2])
            assert set(given) <= set(re.findall(r"--[\w-]+", done.stdout)), command
