"""Federated jobs of several processes: a server, sites that host clients, and what they tell each other."""

from distopt.federated.network.seats import launched_rank
from distopt.federated.network.serve import Service, serve, take_part
from distopt.federated.network.site import Attendance

__all__ = ["Attendance", "Service", "launched_rank", "serve", "take_part"]
