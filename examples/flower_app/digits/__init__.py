"""Federated training on scikit-learn's digits."""
