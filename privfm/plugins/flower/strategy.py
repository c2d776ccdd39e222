"""A Flower strategy around any rule, privacy plan and channel."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from logging import DEBUG, INFO, WARNING
from time import monotonic, sleep
from typing import Final, Literal

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result
from flwr.supercore import log
from torch import Tensor

from privfm.checks import InvalidArgument, RoundFailed, at_least, one_of, require
from privfm.contracts import KEY_HOLDER, Channel, Rule, Transform
from privfm.defenses.channels import Plaintext
from privfm.defenses.mean import Mean
from privfm.defenses.privacy import DPPlan
from privfm.federation.population import FixedSize
from privfm.plugins.flower.exchange import claims_of
from privfm.plugins.flower.hearing import Asked, Heard, from_replies, over_channel
from privfm.plugins.flower.identities import Parties
from privfm.plugins.flower.ledger import Ledger
from privfm.plugins.flower.metrics import averaged
from privfm.plugins.flower.records import Reference
from privfm.plugins.flower.replies import Report, by_client
from privfm.plugins.flower.roster import Roster
from privfm.plugins.flower.terms import Terms
from privfm.plugins.refusals import require_seed

_MOST_SKIPPED: Final = 10  # in a row; by then it is the setting, not chance


class ProtectedStrategy(FedAvg):
    """Flower's FedAvg with another rule, a privacy plan or a channel, and without its open doors.

    Replies become updates against the model that was sent, by name; only float entries are learned. Rows stand in the
    order of clients, so that the order of arrival never changes a result.

    | a reply                                              | what happens                                          |
    |------------------------------------------------------|-------------------------------------------------------|
    | other names, shapes or types; NaN; unreadable        | left out, counted in `report.broken` and against f    |
    | an error                                             | left out, counted in `report.failed`                  |
    | none                                                 | counted in `report.missing`; noise does not get less  |
    | a second one, the same / another                     | heard once / neither of them is heard                 |
    | of a node that was not asked                         | left out, counted in `report.foreign`                 |
    | `num-examples` huge, negative, NaN                   | not read; with weighting="examples" capped, left out  |
    | entries in another order                             | nothing: entries go by name                           |
    | an update of zero                                    | is an update of zero                                  |
    | integer entries                                      | stay the server's                                     |

    Under a plan: the plan draws the clients; every update is clipped again; the sum is divided by the expected cohort
    and noised for it, however many came, in an empty round too; clients' training metrics are dropped and counts stay
    in `reports`, because neither is covered by the guarantee. Federated evaluation is not covered either: its metrics
    are released as clients send them.

    Over a channel of sums clients run `protect_mod`; the server learns what the channel reveals and nothing else.

    Args:
      rule: how updates become one.
      plan: differential privacy of whole clients.
      channel: how updates travel; `Plaintext`: as plain arrays in Flower's messages.
      codec: that clients encode with (`compress_mod`, `protect_mod`).
      weighting: "equal", or "examples": by the count that each client claims, up to `count_cap`.
      count_cap: most examples that count.
      population: number of clients, public. A plan needs it.
      seed: of cohorts, of random rules, and of noise whose source is "seeded": then it must be given, and kept secret.
      identify: "nodes": a client is a node, by its id. "partitions": by the number `partition-id` of its node
        configuration, which every mod of this package reports: cohorts are then the same in every run, and what is
        remembered of clients outlives a process.
      parties: identities, where a channel takes messages of its own.
      exclude: float entries that are not learned.
      max_skipped: rounds in a row that may leave the model as it was before the run is given up.
      fraction_train: share of the nodes that trains; not under a plan.
      fraction_evaluate: share of the nodes that evaluates.
      min_train_nodes: fewest that train; not under a plan.
      min_evaluate_nodes: fewest that evaluate.
      min_available_nodes: fewest that must be connected before a round begins.
      weighted_by_key: of a client's count of examples.
      arrayrecord_key: of the model in messages.
      configrecord_key: of the configuration in messages.
      train_metrics_aggr_fn: as in FedAvg; None: the mean over clients of what more than half of them report.
      evaluate_metrics_aggr_fn: as in FedAvg; None: the same.

    Attributes:
      reports: what became of each round, for the server's own eyes.

    Raises:
      InvalidArgument: parts do not fit together; what depends on the model and on who is there is checked before the
        first message is sent.

    Source: McMahan et al., 2017, algorithm 1, for the shape of a round.
    """

    def __init__(
        self,
        rule: Rule | None = None,
        *,
        plan: DPPlan | None = None,
        channel: Channel | None = None,
        codec: Transform | None = None,
        weighting: Literal["equal", "examples"] = "equal",
        count_cap: int | None = None,
        population: int | None = None,
        seed: int | None = None,
        identify: Literal["nodes", "partitions"] = "nodes",
        parties: Parties | None = None,
        exclude: Collection[str] = (),
        max_skipped: int = _MOST_SKIPPED,
        fraction_train: float = 1.0,
        fraction_evaluate: float = 1.0,
        min_train_nodes: int = 2,
        min_evaluate_nodes: int = 2,
        min_available_nodes: int = 2,
        weighted_by_key: str = "num-examples",
        arrayrecord_key: str = "arrays",
        configrecord_key: str = "config",
        train_metrics_aggr_fn: Callable[[list[RecordDict], str], MetricRecord] | None = None,
        evaluate_metrics_aggr_fn: Callable[[list[RecordDict], str], MetricRecord] | None = None,
    ) -> None:
        self.terms = Terms(
            Mean() if rule is None else rule,
            plan,
            Plaintext() if channel is None else channel,
            codec,
            weighting,
            count_cap,
        )
        one_of("identify", identify, ("nodes", "partitions"))
        at_least("max_skipped", max_skipped, 0)
        protocol = self.terms.protocol is not None
        require(not protocol or parties is not None, f"parties=None: {self.terms.channel} needs pinned identities")
        require(plan is None or fraction_train == 1.0, f"fraction_train={fraction_train}: the plan draws clients")
        self._identify = "partitions" if protocol else identify
        require(
            self._identify == "partitions" or plan is None or not plan.bounds_participation,
            "identify='nodes': a node that starts anew has another id, and nobody could count how often it took part; "
            "use identify='partitions'",
        )
        self._parties, self._exclude, self._max_skipped = parties, tuple(exclude), max_skipped
        self._ledger, self._roster = Ledger(self.terms, population, require_seed(plan, seed)), Roster(population)
        self._population, self._timeout = population, 3600.0
        self._planned, self._width = 0, -1
        self._asked: Asked | None = None
        self._evaluating: dict[int, int] = {}
        self.reports: list[Report] = []
        super().__init__(
            fraction_train,
            fraction_evaluate,
            min_train_nodes,
            min_evaluate_nodes,
            min_available_nodes,
            weighted_by_key,
            arrayrecord_key,
            configrecord_key,
            train_metrics_aggr_fn or averaged,
            evaluate_metrics_aggr_fn or averaged,
        )

    # What Flower calls

    def start(  # noqa: PLR0917  # Flower's own signature
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """As `Strategy.start`. Each of a channel's stages may take `timeout` seconds.

        Raises:
          InvalidArgument: parts do not fit together, or the plan's budget does not pay for so many rounds.
          RoundFailed: more than `max_skipped` rounds in a row left the model as it was, or too few nodes connect.
        """
        plan, played = self.terms.plan, self._ledger.round
        self._width = Reference(initial_arrays, self._exclude).d
        if plan is not None and plan.budget is not None:
            paid = plan.rounds_within(played + num_rounds, d=self._width) - played
            require(
                paid >= num_rounds,
                f"num_rounds={num_rounds}: epsilon {plan.budget:g} pays for {max(paid, 0)}; ask for as many",
            )
        self._timeout, self._planned = timeout, played + num_rounds
        return super().start(grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draws the clients and keeps the model they are sent; a channel's messages are sent by `aggregate_train`.

        Clients read the round as `server-round`; it counts on where a run is resumed.
        """
        if self.fraction_train == 0.0:
            return []
        reference = Reference(arrays, self._exclude)
        fewest = 0 if self.terms.plan else self.min_train_nodes
        present = self._present(grid, max(fewest, self.min_available_nodes))
        size = FixedSize(max(int(len(present) * self.fraction_train), self.min_train_nodes, 1))
        self._ledger.begin(reference.d, size, len(present))
        drawn = self._ledger.drawn() if self.terms.plan else self._sampled(present, size, "cohort")
        clients = {number: present[number] for number in drawn if number in present}
        absent = tuple(number for number in drawn if number not in present)
        log(self._level, "configure_train: %s clients of %s that are connected", len(clients), len(present))
        own = ConfigRecord({**config, "server-round": self._ledger.round + 1})
        content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: own})
        self._asked = Asked(grid, clients, reference, content, absent)
        return [] if self.terms.protocol else self._messages(clients, content, MessageType.TRAIN)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next model, None where the round is skipped, and what may be told of the round.

        Raises:
          InvalidArgument: no round was configured.
          RoundFailed: more than `max_skipped` rounds in a row left the model as it was.
        """
        if self.fraction_train == 0.0:
            return None, None
        asked, self._asked = self._asked, None
        if asked is None:
            raise InvalidArgument("aggregate_train without configure_train: nobody knows which model clients were sent")
        if self.terms.protocol is None:
            heard = from_replies(asked, replies, self.terms, self._ledger, self.weighted_by_key)
        else:
            nodes = dict(asked.clients)
            holder = self._roster.key_holder(list(asked.grid.get_node_ids()))
            nodes |= {} if holder is None else {KEY_HOLDER: holder}
            heard = over_channel(asked, nodes, self.terms, self._ledger, self._own, self._timeout)
        self._ledger.skipped = 0 if heard.model is not None else self._ledger.skipped + 1
        self.reports.append(heard.report)
        self._log(heard.report)
        if self._ledger.skipped > self._max_skipped:
            raise RoundFailed(f"{self._ledger.skipped} rounds in a row were skipped, at last: {heard.report.skipped}")
        return heard.model, self._metrics(heard)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As in FedAvg, with clients drawn from the strategy's own seed; a key holder evaluates nothing."""
        if self.fraction_evaluate == 0.0:
            return []
        present = self._present(grid, max(self.min_evaluate_nodes, self.min_available_nodes))
        size = FixedSize(max(int(len(present) * self.fraction_evaluate), self.min_evaluate_nodes, 1))
        clients = {number: present[number] for number in self._sampled(present, size, "evaluation")}
        self._evaluating = clients
        own = ConfigRecord({**config, "server-round": self._ledger.round})
        content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: own})
        return self._messages(clients, content, MessageType.EVALUATE)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Metrics of the clients that were asked and answered, each heard once; None of nobody."""
        clients, self._evaluating = self._evaluating, {}
        contents = list(by_client(replies, clients).good.values())
        return self.evaluate_metrics_aggr_fn(contents, self.weighted_by_key) if contents else None

    def summary(self) -> None:
        """Logs what is played, who learns what, and what privacy that is worth."""
        super().summary()
        terms, learns = self.terms, self.terms.channel.learns
        log(INFO, "\t├──> Protection:")
        log(INFO, "\t│\t├── Rule: %s | Channel: %s | Codec: %s", terms.rule, terms.channel, terms.codec)
        log(INFO, "\t│\t└── Server learns: %s", learns.get("server", "nothing"))
        for statement in self.statements(max(self._planned, self._ledger.round)):
            log(INFO, "\t└──> Privacy: %s", statement)

    # What it remembers

    def statements(self, rounds: int | None = None) -> tuple[str, ...]:
        """The complete privacy statements in words, after so many rounds; after those played when None.

        Empty without a plan. An epsilon without unit, adversary and relation would mean nothing.
        """
        return tuple(
            f"epsilon {each.epsilon:.4g} at delta {each.delta:g} after {each.rounds} rounds, unit {each.unit}, noise "
            f"{each.place}, against {each.adversary}, {each.relation}; {each.noise}; {each.tuning}; training metrics "
            "are dropped, evaluation metrics are not covered"
            for each in self._ledger.records(rounds, self._width)
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Everything but the model to go on from, as tensors by name: fit for `safetensors.torch.save_file`.

        Save it together with the model, after every round: under a plan a round that is played again is one more
        release, unless its noise is seeded. It is as secret as the noise.
        """
        return dict(self._ledger.state)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from `state_dict` of a strategy that was made with the same arguments.

        Raises:
          InvalidArgument: it is of another kind of strategy, or the rule remembers clients that nobody could find
            again, because nodes have new ids.
        """
        keyed = any(rule.keyed for rule in self.terms.rule.nested)
        require(
            not keyed or self._identify == "partitions",
            f"{self.terms.rule.title} remembers clients, and a new run gives nodes new ids; use identify='partitions'",
        )
        self._ledger.load(state)

    # Inside

    @property
    def _level(self) -> int:
        """Of what is logged about one round: a plan does not cover how many clients came."""
        return INFO if self.terms.plan is None else DEBUG

    @property
    def _own(self) -> Parties:
        if self._parties is None:
            raise InvalidArgument("parties=None: a channel needs pinned identities")
        return self._parties

    def _messages(self, clients: Mapping[int, int], content: RecordDict, kind: str) -> list[Message]:
        return list(self._construct_messages(content, list(clients.values()), kind))

    def _sampled(
        self, present: Mapping[int, int], size: FixedSize, purpose: Literal["cohort", "evaluation"]
    ) -> list[int]:
        numbers = list(present)
        return [numbers[place] for place in self._ledger.sampled(size, len(numbers), purpose)]

    def _present(self, grid: Grid, least: int) -> dict[int, int]:
        """Clients that are connected, number -> node; waits until there are enough, and a key holder where needed."""
        until = monotonic() + self._timeout
        channel, tried = self.terms.protocol, set[int]()
        while True:
            connected = list(grid.get_node_ids())
            self._introduce(grid, connected, tried)
            found = self._roster.here(connected)
            holder = channel is None or not channel.key_holder_stages or self._roster.key_holder(connected) is not None
            if len(found) >= least and holder:
                return found
            missing = f"{len(found)} clients of at least {least} are connected{'' if holder else ', and no key holder'}"
            if monotonic() >= until:
                silent = len(self._roster.unknown(connected))
                why = f"; {silent} nodes do not say who they are: they need a partition-id and a mod" if silent else ""
                raise RoundFailed(f"{missing} after {self._timeout:g} seconds{why}")
            log(INFO, "Waiting for nodes: %s", missing)
            sleep(min(1.0, max(until - monotonic(), 0.0)))

    def _introduce(self, grid: Grid, connected: Sequence[int], tried: set[int]) -> None:
        """Gives new nodes their numbers; who was tried before the round is not asked again."""
        if self._identify == "nodes":
            surplus = self._roster.number(connected)
            require(
                not surplus or self._ledger.d >= 0,
                f"population={self._population}: {len(set(connected))} nodes are connected; give the true number",
            )
        elif unknown := [node for node in self._roster.unknown(connected) if node not in tried]:
            tried.update(unknown)
            claims = claims_of(grid, unknown, self._ledger.round, self._timeout, self._parties)
            surplus = self._roster.claim(connected, claims)
        else:
            return
        if surplus:
            log(WARNING, "privfm: nodes %s are no clients: too many, or with a number that is not theirs", surplus)

    def _log(self, report: Report) -> None:
        log(
            self._level,
            "aggregate_train: %s clients used, %s broken, %s failed, %s missing, %s foreign%s",
            len(report.used),
            report.bad,
            len(report.failed),
            len(report.missing),
            report.foreign,
            f"; skipped: {report.skipped}" if report.skipped else "",
        )

    def _metrics(self, heard: Heard) -> MetricRecord:
        """What `Result` keeps, and Flower logs: under a plan only what depends on no data."""
        if self.terms.plan is not None:
            statements = self._ledger.records(None, self._ledger.d)
            told = {f"privfm.epsilon.{each.adversary}": each.epsilon for each in statements}
            return MetricRecord({**told, "privfm.delta": self.terms.plan.delta, "privfm.rounds": self._ledger.round})
        report, contents = heard.report, heard.contents
        metrics = self.train_metrics_aggr_fn(contents, self.weighted_by_key) if contents else MetricRecord()
        counts = {
            "asked": len(report.asked),
            "used": len(report.used),
            "broken": report.bad,
            "failed": len(report.failed),
            "missing": len(report.missing),
            "skipped": int(bool(report.skipped)),
        }
        if report.kept is not None:
            counts["kept"] = len(report.kept)
        return MetricRecord({**metrics, **{f"privfm.{name}": count for name, count in counts.items()}})
