import pytest
from environments import closure, link


@pytest.fixture(scope="session")
def linked(tmp_path_factory):
    """Torch and numpy with what they need; beside them no environment of these tests has anything."""
    folder = tmp_path_factory.mktemp("linked") / "packages"
    link(closure("torch", "numpy"), folder)
    return folder
