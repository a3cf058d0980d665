"""Many local steps, then one sparse outer step: for links as slow as those between continents."""

from distopt.local.advice import Plan, choose, contribution_bytes, every_step, forecast, plan
from distopt.local.attachment import LocalAttachment
from distopt.local.configuration import DiLoCo, LocalSteps, SparseLoCo
from distopt.local.fragment import Fragment, partition
from distopt.local.simulation import LocalHistory, simulate

__all__ = [
    "DiLoCo",
    "Fragment",
    "LocalAttachment",
    "LocalHistory",
    "LocalSteps",
    "Plan",
    "SparseLoCo",
    "choose",
    "contribution_bytes",
    "every_step",
    "forecast",
    "partition",
    "plan",
    "simulate",
]
