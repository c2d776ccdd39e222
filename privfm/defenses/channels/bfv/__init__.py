"""Exact homomorphic encryption of whole numbers."""

from privfm.defenses.channels.bfv.channel import BFV

__all__ = ["BFV"]
