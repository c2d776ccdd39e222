"""Which node is which client: Flower's node ids are random and change with every process, clients are numbered."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import final

from privfm.contracts import KEY_HOLDER

_MOST = 2**31
"""Client numbers stay below: rules remember them as tensors."""


@final
class Roster:
    """Nodes and their numbers. Who has one keeps it as long as its node is connected.

    Args:
      most: clients there may be: numbers are 0 to most - 1; None: any number.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = _MOST if most is None else most
        self._numbers: dict[int, int] = {}

    def __len__(self) -> int:
        """Nodes that were ever numbered."""
        return len(self._numbers)

    def unknown(self, connected: Sequence[int]) -> list[int]:
        """Nodes without a number, in order."""
        return sorted(set(connected) - self._numbers.keys())

    def here(self, connected: Sequence[int]) -> dict[int, int]:
        """Number -> node of the clients that are connected, by number; the key holder is not among them."""
        found = {self._numbers[node]: node for node in connected if node in self._numbers}
        return {number: found[number] for number in sorted(found) if number != KEY_HOLDER}

    def key_holder(self, connected: Sequence[int]) -> int | None:
        """The node that plays the key holder."""
        return next((node for node in sorted(connected) if self._numbers.get(node) == KEY_HOLDER), None)

    def number(self, connected: Sequence[int]) -> list[int]:
        """Numbers nodes in the order of their ids, after those that have one.

        Returns:
          Nodes that are too many, and stay without.
        """
        unknown, free = self.unknown(connected), max(self._numbers.values(), default=-1) + 1
        fits = max(self._most - free, 0)
        self._numbers |= {node: free + place for place, node in enumerate(unknown[:fits])}
        return unknown[fits:]

    def claim(self, connected: Sequence[int], claims: Mapping[int, int]) -> list[int]:
        """Gives nodes the numbers they claim.

        | a number                                        | goes to                       |
        |-------------------------------------------------|-------------------------------|
        | that one node claims                            | it                            |
        | that several claim at once                      | none of them                  |
        | of another node, which is connected             | who has it                    |
        | of another node, which is gone (it came back)   | the node that claims it       |
        | below 0 (but the key holder's), or beyond most  | nobody                        |

        Args:
          connected: all nodes that are there.
          claims: node -> number.

        Returns:
          Nodes whose claim was refused.
        """
        wanted = defaultdict(list)
        for node, number in sorted(claims.items()):
            wanted[number].append(node)
        owners = {number: node for node, number in self._numbers.items() if node in connected}
        refused = list[int]()
        for number, nodes in wanted.items():
            valid = number == KEY_HOLDER or 0 <= number < self._most
            if not valid or len(nodes) > 1 or number in owners:
                refused += nodes
                continue
            self._numbers = {node: own for node, own in self._numbers.items() if own != number} | {nodes[0]: number}
        return sorted(refused)
