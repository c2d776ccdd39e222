"""Engines carry messages between the server's half of a round and the parties.

`Local` comes when it is asked for: a Flower client's thin process imports this package, and has no use for torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from privfm.engines.local import Local

__all__ = ["Local"]


def __getattr__(name: str) -> Any:
    if name == "Local":
        from privfm.engines.local import Local

        return Local
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
