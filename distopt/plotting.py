"""What plots are drawn with: matplotlib, where it is installed, and colours."""

from typing import TYPE_CHECKING

from distopt.errors import CompatibilityError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart by colour-blind readers and in grey.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")


def load_matplotlib() -> "type[Figure]":
    """What `plot` draws with.

    Raises:
        CompatibilityError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise CompatibilityError(
            'the plot needs matplotlib, which is not installed; pip install "torch-distopt[cli]"'
        ) from error
    return Figure
