"""Federated averaging in Flower alone."""
