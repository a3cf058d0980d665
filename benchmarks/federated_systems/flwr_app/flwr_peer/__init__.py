"""The task of federated_peers.py with Flower's own FedAvg; `task` is federated_systems/task.py, from PYTHONPATH."""
