"""A one-time key-homomorphic pad. Research."""

from privfm.defenses.channels.pad.channel import RLWEPad

__all__ = ["RLWEPad"]
