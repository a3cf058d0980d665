"""Federated averaging: rounds between a server and clients that come and go."""
