"""Every example is run by a test of its own, and every starter by one."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [*sorted((ROOT / "examples").glob("*.py")), *sorted(ROOT.glob("examples/*/pyproject.toml"))]
STARTERS = sorted(path for path in (ROOT / "launch").rglob("*") if path.is_file() and path.suffix in (".sh", ".sbatch"))
TESTS = [path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__) and "documents" not in path.parts]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.relative_to(ROOT / "examples").as_posix())
def test_an_example_has_a_test_that_names_it(script):
    name = script.name if script.suffix == ".py" else f'"{script.parent.name}"'
    naming = [path for path in TESTS if name in path.read_text() and path.name.startswith(("test_", "example_"))]
    assert naming, f"no test runs {script.relative_to(ROOT)}"


@pytest.mark.parametrize("starter", STARTERS, ids=lambda path: path.name)
def test_a_starter_has_a_test_that_names_it(starter):
    assert [path for path in TESTS if starter.name in path.read_text()], f"no test runs launch/{starter.name}"
