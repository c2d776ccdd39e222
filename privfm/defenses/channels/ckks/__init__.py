"""Approximate homomorphic encryption: sums, and how much of them may be released."""

from privfm.defenses.channels.ckks.channel import CKKS

__all__ = ["CKKS"]
