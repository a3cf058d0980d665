"""Many local steps, then one sparse outer step: for links as slow as those between continents."""

from distopt.local.configuration import DiLoCo, LocalSteps, SparseLoCo
from distopt.local.fragment import Fragment, partition

__all__ = ["DiLoCo", "Fragment", "LocalSteps", "SparseLoCo", "partition"]
