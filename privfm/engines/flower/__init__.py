"""Parties on hosts of their own: the same run on Flower, simulated or deployed."""
