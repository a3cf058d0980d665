"""Federated jobs of several processes: a server, sites that host clients, and what they tell each other.

if federated.launched_rank() == 0:
history = federated.serve(rounds=100, model=model, clients=data, algorithm=FedAU(), ...)
else:
federated.take_part(model=model, clients=data, ...)
"""

from distopt.federated.network.seats import launched_rank
from distopt.federated.network.service import Service, serve
from distopt.federated.network.site import Attendance
from distopt.federated.network.taking_part import take_part

__all__ = ["Attendance", "Service", "launched_rank", "serve", "take_part"]
