"""How a run is played on Flower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from privfm.checks import at_least, one_of, positive


@dataclass(frozen=True)  # not final: jsonargparse (4.53) refuses an instance of a final class as a default
class FlowerSettings:
    """What `engine = "flower"` needs to know; results do not depend on it.

    Args:
      mode: `simulation` plays all hosts on Flower's simulation engine (Ray); `deployment` on its deployment engine, a
        SuperNode each, in processes of their own.
      hosts: how many hosts the clients are dealt out to, several on each; a key holder has one more, of its own.
      clients: how many there are, where each host has data of its own (`privfm flower-app`): what the configuration's
        `data` names is then on the server's host that server's, and on any other its clients'. 0: everybody reads the
        same data, which are dealt out; a federation on one machine is played so.
      threads: of each process that computes; results depend on it in the last digits.
      start_seconds: for all hosts to be there, with model and data loaded.
      stage_seconds: for the replies to one stage of the protocol; whoever is later has dropped out.
    """

    mode: Literal["simulation", "deployment"] = "simulation"
    hosts: int = 2
    clients: int = 0
    threads: int = 1
    start_seconds: float = 300.0
    stage_seconds: float = 3600.0

    def __post_init__(self) -> None:
        one_of("mode", self.mode, ("simulation", "deployment"))
        at_least("hosts", self.hosts, 1)
        at_least("clients", self.clients, 0)
        at_least("threads", self.threads, 1)
        positive("start_seconds", self.start_seconds)
        positive("stage_seconds", self.stage_seconds)
