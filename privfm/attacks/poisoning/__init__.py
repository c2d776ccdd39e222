"""Poisoning: malicious clients that move the model."""

from privfm.attacks.poisoning.updates import ALIE, SignFlip, alie_z

__all__ = ["ALIE", "SignFlip", "alie_z"]
