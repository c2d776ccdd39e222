"""What server and clients must agree on, and which plans and channels fit somebody else's Flower app."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, final

from privfm.checks import InvalidArgument, at_least, one_of, require
from privfm.contracts import Channel, Rule, Sampling, Transform
from privfm.defenses.channels import Plaintext
from privfm.defenses.mean import Mean
from privfm.defenses.privacy import DPPlan
from privfm.federation.arm import Arm
from privfm.federation.compatibility import problems
from privfm.federation.population import Poisson
from privfm.plugins.refusals import require_codec, require_real_clients, require_secret_noise


@final
@dataclass(frozen=True)
class Terms:
    """What both sides speak: the server's strategy and the clients' mods are made from the same.

    Args:
      rule: how updates become one.
      plan: differential privacy of whole clients; None: none.
      channel: how rows travel. `Plaintext`: as plain arrays in Flower's own messages.
      codec: the wire format of a row; None: none.
      weighting: how much each client counts: all the same, or by the examples that it claims, up to `count_cap`.
      count_cap: most examples that count; a claim beyond it counts as much as one of the cap.

    Raises:
      InvalidArgument: a plan whose guarantee a Flower app cannot keep, a channel whose sum the server must not see, or
        a codec that is none.
    """

    rule: Rule = field(default_factory=Mean)
    plan: DPPlan | None = None
    channel: Channel = field(default_factory=Plaintext)
    codec: Transform | None = None
    weighting: Literal["equal", "examples"] = "equal"
    count_cap: int | None = None

    def __post_init__(self) -> None:
        for name, kind in (("rule", Rule), ("channel", Channel)):
            value = getattr(self, name)
            require(isinstance(value, kind), f"{name}={value!r}: expected a {kind.__name__}")
        require(
            self.channel.server_learns_sum,
            f"channel={self.channel}: its result is for clients alone, and a strategy holds the model; use a key "
            "holder apart",
        )
        one_of("weighting", self.weighting, ("equal", "examples"))
        if self.codec is not None:
            require_codec(self.codec)
        if self.weighting == "examples":
            require(
                self.count_cap is not None,
                "count_cap=None: what a client claims to hold is what an attacker chooses; weighting='examples' needs "
                "the most examples that may count",
            )
            require(
                self.protocol is None,
                f"weighting='examples': over {type(self.channel).__name__} nobody checks what a client multiplies its "
                "row by; use equal weighting",
            )
            require(self.plan is None, "weighting='examples': no plan covers counts; use equal")
        if self.count_cap is not None:
            at_least("count_cap", self.count_cap, 1)
            require(self.weighting == "examples", f"count_cap={self.count_cap}: only weighting='examples' has a cap")
        if self.plan is not None:
            _check_plan(self.plan, self.protocol)

    @property
    def protocol(self) -> Channel | None:
        """The channel where it takes messages of its own; None: updates travel as plain arrays."""
        return None if isinstance(self.channel, Plaintext) else self.channel

    def arm(self, cohort: Sampling | None = None) -> Arm:
        """The same as the rounds of this project know it.

        Args:
          cohort: who takes part, everybody when None; a plan draws by itself.
        """
        return Arm(
            cohort=None if self.plan is not None else cohort or Poisson(1.0),
            rule=self.rule,
            channel=self.channel,
            transforms=() if self.codec is None else (self.codec,),
            plan=self.plan,
            weighting=self.weighting,
        )

    def refuse_problems(self, cohort: Sampling, d: int, population: int) -> None:
        """Raises `InvalidArgument` with everything that does not fit together, each with its way out."""
        found = problems(self.arm(cohort), d, population, rooted=False)
        require(not found, "; ".join(f"{problem.what} (instead: {problem.instead})" for problem in found))


def _check_plan(plan: DPPlan, protocol: Channel | None) -> None:
    require(
        plan.unit == "client",
        "unit='example': gradients are clipped and noised inside a client's own training, which a strategy cannot see; "
        "protect them there, and use unit='client' here",
    )
    require_secret_noise(plan)
    require_real_clients(plan)
    if protocol is not None and plan.adaptive:
        raise InvalidArgument("clipping=AdaptiveQuantile: the clip moves, and the channel's clients know one only")
