"""A sum under pairwise masks: each client hides its row behind masks that cancel in the sum of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from privfm.checks import RoundFailed, at_least, fraction, require
from privfm.contracts import Channel, Exchange, Intake, Memory, Party, Reveals, Update, View
from privfm.defenses.channels.envelope import Header, fingerprint
from privfm.defenses.channels.masks import client as mask_client
from privfm.defenses.channels.masks import graph as mask_graph
from privfm.defenses.channels.masks.graph import MaskGraph
from privfm.defenses.channels.masks.server import MaskedSum
from privfm.defenses.channels.masks.shamir import MOST_SHARES
from privfm.defenses.views import SumView

_MOST_BITS = 53  # half the modulus, and with it every centred sum, is then a whole number that float64 holds
_HALF, _THIRD = 1 / 2, 1 / 3


@final
@dataclass(frozen=True)
class PairwiseMasks(Channel):
    """Whole numbers modulo 2^`modulus_bits`, each row behind a mask of its own and one with every neighbour.

    | stage   | a client sends                                                              | the server           |
    |---------|-----------------------------------------------------------------------------|----------------------|
    | keys    | two fresh public keys; signed in the active mode                            | draws the neighbours |
    | shares  | a fresh seed and its mask key, each in encrypted shares for its neighbours  | passes them on       |
    | masked  | its row + mask of the seed +- masks with each neighbour, modulo m           | adds them up         |
    | confirm | active mode: its signature under the list of survivors                      | passes them on       |
    | unmask  | for each neighbour one share: of the seed if it survived, of the key if not | takes the masks off  |

    The masks between two survivors cancel. What is left is the mask of each survivor's seed, which its neighbours'
    shares open, and the masks with those who dropped out after they dealt, whose keys the shares open. No client
    helps to open both secrets of one client: with both its row would lie open.

    Who learns what. The server: who took part, and the sum modulo m. Clients: who their neighbours are, and which of
    them survived. Semi-honest (`active=False`): it holds while the server does what is written here, whatever it
    computes from what it sees, together with up to a share `corrupt` of the clients that announce keys, and but for the
    probability that `graph` states. A server that lies gets rows: it can pass on keys of its own making (and then reads
    every share), or surround a client with corrupt neighbours, who give both secrets. With honest neighbours and true
    keys, lies about who dropped out do not open both secrets of a client: more than half of the holders of its shares
    must tell the same story. But who hears which story is the server's choice, client by client, so that it may open
    the sum of fewer clients than `smallest_release` (4 of 10, say), and where not all are neighbours cut some off.

    Active (`active=True`): also while the server lies. Keys are signed by pinned identities, all clients are neighbours
    (or it would choose the victim's), the threshold is above 2n/3, and nobody unmasks before so many have signed the
    same list of survivors; see `mask_graph.active`. At most floor(corrupt * clients) of those asked may be corrupt, and
    more than that are honest in any sum that is opened. It can still end any round, and decide who is asked and who
    counts as dropped out, before the list is signed. Identities must be pinned truly in both modes.

    In neither mode is it checked what a client sends: a malicious one adds any row, unseen. Wrong shares are found out
    by what their owner published of them: as long as enough right ones arrive they do no harm, else the round ends
    with the name of the client.

    | event                                                       | result                                         |
    |-------------------------------------------------------------|------------------------------------------------|
    | a row not finite, not whole or beyond m/2                   | the client refuses; left out, counted in `bad` |
    | all who answered refused                                    | RoundFailed, with the way out                  |
    | a broken, foreign, replayed or second message of a client   | left out, and counted in `bad` with its row    |
    | a drop-out at any stage                                     | recovered, down to the threshold               |
    | fewer than threshold, `smallest_release`, `least_answers`   | TooFewClients, before anything is unmasked     |
    | nobody sent a row                                           | zeros, n = 0                                   |
    | a server that tells a client what cannot be                 | the client raises Corrupt: the round ends      |

    The sum is exact modulo m, bit for bit, so that runs repeat although keys and masks never do. What it leaves to
    others: a codec makes numbers whole, and whether n of them may leave [-m/2, m/2) follows from its range. With
    distributed noise that has a probability, which the codec states.

    Cost, for n clients with k neighbours and rows of d numbers: a client computes 2k key agreements (0.1 ms each) and
    k + 1 masks (0.8 ms for 10^6 numbers of 32 bits), and sends ceil(modulus_bits / 8) bytes a number and 120 k bytes
    besides; in the active mode it also checks 2n signatures. The server expands n masks, and k for each drop-out, and
    holds one row.

    Args:
      clients: most clients in one sum.
      corrupt: largest share of the clients that works with the server. 0.2 is an assumption, not a measurement.
      dropouts: largest share of the clients that goes missing within a round.
      modulus_bits: 8 to 53; sums are taken modulo m = 2^modulus_bits.
      neighbours: k, an even number, whatever it is worth (see `graph`); None: the fewest that meet the bounds.
      active: against a server that does not follow the protocol.
      smallest_release: fewest clients in a sum that clients help to open. A client counts by the server's word, in the
        active mode by the list that it signs.

    Raises:
      InvalidArgument: the assumptions cannot be met, or contradict each other.

    >>> print(PairwiseMasks(clients=200).graph(200).statement)
    200 clients: 38 neighbours, threshold 27; shows more than the sum: probability <= 2^-40.3; fails: never

    Sources: Bonawitz et al., "Practical secure aggregation for privacy-preserving machine learning", 2017;
    Bell et al., "Secure single-server aggregation with (poly)logarithmic overhead", 2020.
    """

    clients: int
    corrupt: float = 0.2
    dropouts: float = 0.05
    modulus_bits: int = 32
    neighbours: int | None = None
    active: bool = False
    smallest_release: int = 2
    reveals = Reveals.SUM
    row_stage = "masked"
    integers = True

    def __post_init__(self) -> None:
        at_least("smallest_release", self.smallest_release, 2)  # the sum of one is its row
        at_least("clients", self.clients, self.smallest_release)
        at_least("modulus_bits", self.modulus_bits, 8)
        require(self.modulus_bits <= _MOST_BITS, f"modulus_bits={self.modulus_bits}: expected at most {_MOST_BITS}")
        fraction("corrupt", self.corrupt, zero=True, one=False)
        fraction("dropouts", self.dropouts, zero=True, one=False)
        require(
            self.dropouts < _HALF,
            f"dropouts={self.dropouts}: expected under 1/2, or half of a client's neighbours could open a secret, and "
            "the other half its other one; ask more clients",
        )
        require(
            self.corrupt + self.dropouts < 1,
            f"corrupt={self.corrupt}, dropouts={self.dropouts}: nobody honest would be left; assume less",
        )
        if self.active:
            require(self.neighbours is None, "neighbours: the active mode takes all of them; leave it out")
            require(
                max(self.corrupt, self.dropouts) < _THIRD,
                f"corrupt={self.corrupt}, dropouts={self.dropouts}: expected each under 1/3 in the active mode, as "
                "more than 2/3 of the clients must agree",
            )
        _ = self.graph(self.clients)  # refuses what cannot be met

    def graph(self, clients: int) -> MaskGraph:
        """What a round in which `clients` answer uses: neighbours, threshold, and the probabilities that follow.

        `statement` says it in one line; `meets_bounds` whether a number of neighbours given by hand is enough.

        Raises:
          InvalidArgument: the bounds cannot be met, or there are more neighbours than a secret has shares.
          TooFewClients: active mode, and a third of them may be corrupt.
        """
        if self.active:
            graph = mask_graph.active(clients, self.assumed, self.dropouts)
        elif self.neighbours is None:
            graph = mask_graph.smallest(clients, self.corrupt, self.dropouts)
        else:
            graph = mask_graph.given(clients, self.neighbours, self.corrupt, self.dropouts)
        require(
            graph.neighbours < MOST_SHARES,
            f"clients={clients}: {graph.neighbours} neighbours each, but a secret has {MOST_SHARES} shares at most; "
            "ask fewer clients, assume fewer corrupt or missing, or do without active",
        )
        return graph

    @property
    def assumed(self) -> int:
        """Most clients that may be corrupt, of `clients`; in the active mode however few answer."""
        return int(self.corrupt * self.clients + 1e-9)  # 0.29 of 100 are 29

    @property
    def client_stages(self) -> tuple[str, ...]:  # type: ignore[override]  # a constant of the class elsewhere
        return ("keys", "shares", "masked", *(("confirm",) if self.active else ()), "unmask")

    @property
    def most_clients(self) -> int | None:
        return self.clients

    @property
    def modulus(self) -> int:
        return 1 << self.modulus_bits

    @property
    def largest_coordinate(self) -> float | None:
        return self.modulus / 2

    @property
    def grid(self) -> float | None:
        return 1.0

    def facts(self, d: int, n: int) -> Mapping[str, str]:
        return {"masks": self.graph(min(max(n, self.least_clients), self.clients)).statement}

    @property
    def least_clients(self) -> int:
        agreeing = 3 * int(self.corrupt * self.clients + 1e-9) + 1 if self.active else 2
        return max(self.smallest_release, agreeing)

    @property
    def learns(self) -> Mapping[str, str]:
        server = "does whatever it likes" if self.active else "follows the protocol"
        least = f"at most {self.assumed}" if self.active else f"at most a share {self.corrupt:g}"
        return {
            "server": "who took part, and the sum modulo m",
            "clients": "their neighbours, who of them survived, the released model",
            "trust": f"the server {server}; {least} of the clients work with it; identities are pinned truly",
        }

    def with_floor(self, least: int) -> PairwiseMasks:
        return replace(self, smallest_release=max(least, self.smallest_release))

    def error_bound(self, d: int, n: int) -> float:
        """0: the sum of n rows of width d is exact modulo m."""
        return 0.0

    def reply(self, party: Party, stage: str, memory: Memory, request: bytes, update: Update) -> tuple[Memory, bytes]:
        if stage == "masked":
            return mask_client.mask(self, party, memory, request, update)
        stages = {
            "keys": mask_client.announce,
            "shares": mask_client.deal,
            "confirm": mask_client.confirm,
            "unmask": mask_client.unmask,
        }
        return stages[stage](self, party, memory, request)

    def collect(self, cohort: Sequence[int], intake: Intake, exchange: Exchange) -> View:
        if len(cohort) > self.clients:
            raise RoundFailed(f"clients={self.clients}: a cohort of {len(cohort)} has no head-room; raise clients")
        masked = MaskedSum(self, intake, exchange)
        masked.gather(cohort)

        def total() -> Tensor:
            if not masked.ids:
                return torch.zeros(intake.d)
            return intake.total(torch.from_numpy(masked.open()).double())

        return SumView(total, masked.ids, intake.d, masked.bad)

    def header(self, stage: str, session: bytes) -> Header:
        """What all messages of a stage say: these parameters, and the session that the server drew for the round."""
        return Header("masks", fingerprint(repr(self).encode()), session, stage)
