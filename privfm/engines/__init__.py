"""Engines carry messages between the server's half of a round and the parties."""

from privfm.engines.local import Local

__all__ = ["Local"]
