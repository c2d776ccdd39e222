"""The plan: clip, sampling, noise, denominator and epsilon from one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, isfinite
from typing import TYPE_CHECKING, Literal, final

import torch
from torch import Generator, Tensor

from privfm.checks import at_least, fraction, non_negative, one_of, positive, require
from privfm.contracts import Clipping, Rule, Spans, Transform
from privfm.defenses.privacy.accounting import Relation
from privfm.defenses.privacy.calibration import calibrated_noise, with_own_noise
from privfm.defenses.privacy.clipping import AdaptiveQuantile, ClientClip, Flat
from privfm.defenses.privacy.correlated_noise import sensitivity as correlated_sensitivity
from privfm.defenses.privacy.example_level import ExamplePrivacy, LocalSampling
from privfm.defenses.privacy.integer_noise import IntegerNoise
from privfm.defenses.privacy.noise import NoiseSource, noised
from privfm.defenses.privacy.releases import GaussianRelease, QuantileRelease
from privfm.defenses.privacy.statements import EpsilonRecord, Place, described, records

if TYPE_CHECKING:
    from dp_accounting import DpEvent

LARGEST_EPSILON = 20.0
"""More than this protects nobody: exp(20) is a likelihood ratio of 5e8."""

Sampled = Literal["poisson", "fixed_size", "full", "cyclic"]


@final
@dataclass(frozen=True)
class DPPlan:
    """Differential privacy of a whole run: what is protected, who adds the noise, and what it is worth.

    Formal guarantee, for the defaults: with the cohorts secret and N public, the released models of all rounds are
    (epsilon, delta)-indistinguishable from those of a run in which one client's updates are zero (zero-out relation;
    for these mechanisms the same numbers as add-or-remove). It says nothing against the server, which sees the sum
    before the noise, nor against anybody who knows who took part. What is protected is what clients train on: rows of
    the same people that fell to the validation or test split are evaluation data, and metrics on them are released.

    | unit    | place       | noise                                    | epsilon is against                    |
    |---------|-------------|------------------------------------------|---------------------------------------|
    | client  | central     | server, on the sum                       | whoever sees released models          |
    | client  | key_holder  | who decrypts, before the server sees it  | the server, then released models      |
    | client  | local       | every client, on its own update          | the server                            |
    | client  | distributed | shares of all clients, on integers       | the server                            |
    | example | local       | every client, in every step              | the server, the largest over clients  |

    Conditions, enforced elsewhere: `compatibility.problems` refuses rules other than the mean where noise is made for a
    sum, unbounded codecs and delta >= 1/N; the release fixes the denominator; rows are clipped again wherever the
    server opens them; a client that has taken part `max_participations` times is not asked again.

    Args:
      noise_multiplier: standard deviation of the noise in units of the sensitivity: of the noise on the sum; under
        `local`, of each client's own; under `distributed`, of the shares of the fewest honest answers together. With
        correlated noise it is that of the whole run, of which epsilon is one Gaussian mechanism.
      max_grad_norm: L2 clip of a client's whole update, or of an example's gradient.
      sample_rate: share of the clients that takes part in a round.
      delta: see `EpsilonRecord`.
      unit: see `EpsilonRecord`.
      place: see `EpsilonRecord`.
      sampling: how clients are drawn. `poisson`: each on its own; `fixed_size`: that share of all, without
        replacement; `full`: everybody; `cyclic`: the population is cut into 1/sample_rate groups that take turns.
      relation: neighbouring data sets: a contribution becomes zero, is there or not, or becomes another.
      clipping: how updates or gradients are shortened; None: `Flat`.
      max_participations: most rounds one client may join; enforced.
      bands: above 1, noise is correlated over so many rounds, and a client waits as long between two participations.
      weight_cap: clients count by their number of examples up to this one, the largest weight being 1; None: all the
        same. Sizes are public, the denominator stays fixed.
      local: batches and steps of a client, for examples.
      integers: grid, modulus and the fewest answers, under `distributed`.
      source: where noise comes from: `seeded` can be drawn again by whoever knows the seed; `secure` cannot.
      budget: epsilon at which training stops; None: after all rounds.
      simulated_population: a larger population whose noise, relative to its cohort, this run is given: it shows the
        utility of that population and guarantees nothing itself. None: the run's own.

    Source: McMahan et al., 2018; accounting: see `accounting`.

    >>> plan = DPPlan(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=1.0, delta=1e-5)
    >>> round(plan.epsilon(after=1), 3)
    4.377
    """

    noise_multiplier: float
    max_grad_norm: float
    sample_rate: float
    delta: float
    unit: Literal["client", "example"] = "client"
    place: Place = "central"
    sampling: Sampled = "poisson"
    relation: Relation = "zero-out"
    clipping: Clipping | None = None
    max_participations: int | None = None
    bands: int = 1
    weight_cap: int | None = None
    local: LocalSampling | None = None
    integers: IntegerNoise | None = None
    source: NoiseSource = "seeded"
    budget: float | None = None
    simulated_population: int | None = None

    def __post_init__(self) -> None:
        non_negative("noise_multiplier", self.noise_multiplier)
        positive("max_grad_norm", self.max_grad_norm)
        fraction("sample_rate", self.sample_rate)
        fraction("delta", self.delta, one=False)
        one_of("unit", self.unit, ("client", "example"))
        one_of("place", self.place, ("central", "key_holder", "local", "distributed"))
        one_of("sampling", self.sampling, ("poisson", "fixed_size", "full", "cyclic"))
        one_of("relation", self.relation, ("zero-out", "add-or-remove", "replace-one"))
        one_of("source", self.source, ("seeded", "secure"))
        at_least("bands", self.bands, 1)
        for name in ("max_participations", "weight_cap", "simulated_population"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)
        if self.budget is not None:
            positive("budget", self.budget)
        self._check_sampling()
        self._check_place()
        self._check_noise()

    def _check_sampling(self) -> None:
        rate, groups = self.sample_rate, 1 / self.sample_rate
        require(self.sampling != "full" or rate == 1, f"sample_rate={rate}: everybody is 1; leave sampling out")
        require(self.sampling != "fixed_size" or rate < 1, "sample_rate=1.0: use sampling='full'")
        require(
            self.sampling != "cyclic" or abs(groups - round(groups)) < 1e-9 * groups,
            f"sample_rate={rate}: groups that take turns need 1/sample_rate to be a whole number",
        )

    def _check_place(self) -> None:
        if self.unit == "example":
            require(self.place == "local", f"place={self.place!r}: gradients of examples are noised by clients; local")
            require(self.local is not None, "local=None: examples need a batch size and a number of local steps")
            require(
                self.relation != "add-or-remove",
                "relation='add-or-remove': how many examples a client holds sets its rate, its steps and its "
                "denominator, so that it is public; use zero-out or replace-one",
            )
            require(self.weight_cap is None, f"weight_cap={self.weight_cap}: examples are bounded, not clients")
            return
        require(self.local is None, f"local={self.local}: clients train as they like, only unit='example' needs it")
        require(
            (self.integers is not None) == (self.place == "distributed"),
            f"integers={self.integers} and place={self.place!r}: a grid belongs to distributed noise, and it needs one",
        )
        seen = self.place in {"local", "distributed"} and self.sampling in {"poisson", "fixed_size"}
        require(
            not seen or self.max_participations is not None,
            f"place={self.place!r} and sampling={self.sampling!r}: the server sees who takes part, so that sampling "
            "amplifies nothing against it; bound what one client gives with max_participations",
        )
        require(
            self.relation == "zero-out" or self.place in {"central", "key_holder"},
            f"relation={self.relation!r} and place={self.place!r}: a client that is left out still adds its noise; use "
            "zero-out",
        )
        require(
            self.place != "key_holder" or self.source == "secure",
            "source='seeded': the server knows the seed and could take the key holder's noise off; use secure",
        )

    def _check_noise(self) -> None:
        adaptive = isinstance(self.clipping, AdaptiveQuantile)
        central = self.unit == "client" and self.place == "central"
        require(not adaptive or central, "clipping=AdaptiveQuantile needs a central plan for clients")
        require(
            not adaptive or self.weight_cap is None, "clipping=AdaptiveQuantile counts clients; leave weight_cap out"
        )
        require(
            not adaptive or self.relation == "zero-out",
            f"relation={self.relation!r}: clipping=AdaptiveQuantile is sized for zero-out",
        )
        require(
            self.simulated_population is None or central,
            "simulated_population: only the noise of a central plan for clients can be scaled",
        )
        if self.bands == 1:
            return
        why = f"bands={self.bands}: noise that is correlated between rounds"
        require(central, f"{why} is added by the server, for whole clients; use a central plan, unit client")
        require(not adaptive, f"{why} needs one clip for all of them; leave AdaptiveQuantile out")
        require(self.relation == "zero-out", f"{why} is accounted for zero-out, not {self.relation}")
        require(
            self.sampling == "cyclic" and round(1 / self.sample_rate) >= self.bands,
            f"{why} needs clients to wait {self.bands} rounds between two participations: sampling='cyclic' with "
            f"sample_rate at most {1 / self.bands:.4g}; a claim of amplification by Poisson sampling would be false",
        )
        require(self.max_participations is not None, f"{why} is sized for the most rounds one client joins: give "
                "max_participations")  # fmt: skip

    # What it asks for

    @classmethod
    def calibrated(cls, epsilon: float, delta: float, rounds: int, sample_rate: float, max_grad_norm: float) -> DPPlan:
        """The default plan with the least noise whose epsilon after `rounds` is at most `epsilon`.

        Raises:
          InvalidArgument: an argument is out of range.
        """
        return cls(1.0, max_grad_norm, sample_rate, delta).with_epsilon(epsilon, rounds)

    def with_epsilon(
        self, epsilon: float, rounds: int, examples: Sequence[int] = (), d: int | None = None, own_noise: bool = False
    ) -> DPPlan:
        """The same plan with the least noise whose epsilon after `rounds` is at most `epsilon`.

        Args:
          epsilon: at most 20.
          rounds: that will be played.
          examples: how many each client holds; for examples.
          d: trained values; for distributed noise.
          own_noise: for examples, give each client its own noise: what its own sampling rate needs, and not what the
            smallest client's does.

        Raises:
          InvalidArgument: an argument is out of range, or no noise is enough.
        """
        positive("epsilon", epsilon)
        at_least("rounds", rounds, 1)
        require(epsilon <= LARGEST_EPSILON, f"epsilon={epsilon!r}: expected at most {LARGEST_EPSILON:g}")
        if own_noise:
            require(self.unit == "example", "own_noise: only clients that protect examples add their own")
            return with_own_noise(self, epsilon, rounds, examples)
        base = replace(self, local=self.local and replace(self.local, noise_by_examples=()))
        return replace(base, noise_multiplier=calibrated_noise(base, epsilon, rounds, examples, d))

    # What a round does

    @property
    def noises_the_sum(self) -> bool:
        """Whether the noise is made for a sum of clipped updates: then only that may be released."""
        return self.unit == "client" and self.place != "local"

    @property
    def makes_sizes_public(self) -> bool:
        """Whether the number of examples of each client is taken as known to everybody."""
        return self.unit == "example" or self.weight_cap is not None

    @property
    def bounds_participation(self) -> bool:
        """Whether anybody must count how often clients take part."""
        return self.max_participations is not None or self.bands > 1

    @property
    def local_sampling(self) -> LocalSampling:
        """Batches and steps of a client, under a plan for examples."""
        if self.local is None:
            raise TypeError("a plan for whole clients has no local sampling")
        return self.local

    @property
    def adaptive(self) -> bool:
        """Whether the clip changes from round to round."""
        return isinstance(self.clipping, AdaptiveQuantile)

    @property
    def codec(self) -> Transform | None:
        """The wire format of distributed noise; None elsewhere."""
        if self.integers is None:
            return None
        return self.integers.codec(self.noise_multiplier, self.max_grad_norm, self.source)

    def own_noise(self, rows: Tensor, generators: Sequence[Generator]) -> Tensor:
        """Clipped updates `(k, d)` with each client's own noise, under a local plan for clients."""
        noise, bound = self.noise_multiplier, self.max_grad_norm
        noisy = [noised(row, noise, bound, self.source, one) for row, one in zip(rows, generators, strict=True)]
        return torch.stack(noisy).to(rows) if noisy else rows

    def weights(self, examples: Sequence[int]) -> Tensor:
        """What clients multiply their clipped updates by, `(k,)`: at most 1, so that nobody's clip grows.

        Source: McMahan et al., 2018, section 2.1: `w_k = min(n_k / cap, 1)`.
        """
        cap = self.weight_cap or 1
        return torch.tensor([min(n / cap, 1.0) for n in examples])

    def clip(self, layers: Spans, bound: float | None = None) -> Transform | None:
        """The last client step of an honest client; None where examples are bounded instead."""
        if self.unit == "example":
            return None
        return ClientClip(self.clipping or Flat(), self.max_grad_norm if bound is None else bound, layers)

    def gradient_privacy(self, layers: Spans) -> ExamplePrivacy | None:
        """What local training is given; None where clients are protected as a whole."""
        if self.unit == "client":
            return None
        clipping, local = self.clipping or Flat(), self.local_sampling
        return ExamplePrivacy(clipping, self.max_grad_norm, self.noise_multiplier, local, layers, self.source)

    def release(self, sensitivity: float, population: int, active: Tensor | None = None) -> Rule:
        """The rule that takes the mean's place.

        Args:
          sensitivity: largest L2 norm of one client's decoded row.
          population: number of clients, public.
          active: `(d,)` bool, what is trained in this round.
        """
        require(isfinite(sensitivity), f"sensitivity={sensitivity!r}: expected a finite bound; a codec has none")
        denominator = self.sample_rate * population
        scale = 1.0 if self.simulated_population is None else population / self.simulated_population
        noise = scale * self.noise_multiplier if self.place in {"central", "key_holder"} else 0.0
        elsewhere = self.place == "key_holder"
        if isinstance(self.clipping, AdaptiveQuantile):
            return QuantileRelease(noise, denominator, self.max_grad_norm, self.clipping, self.source, active)
        if self.bands > 1:
            sensitivity *= correlated_sensitivity(self.bands, self.max_participations or 1)
        return GaussianRelease(noise, sensitivity, denominator, self.bands, self.source, active, elsewhere)

    # What it is worth

    def epsilon(
        self, after: int, delta: float | None = None, examples: Sequence[int] = (), d: int | None = None
    ) -> float:
        """Epsilon after so many rounds, of the first of `records`; infinite without noise, zero before the first.

        Args:
          after: rounds.
          delta: instead of the plan's.
          examples: how many each client holds; needed for examples.
          d: trained values; needed for distributed noise.
        """
        plan = self if delta is None else replace(self, delta=delta)
        return plan.record(after, examples, d).epsilon

    def curve(
        self, rounds: int, points: int = 12, examples: Sequence[int] = (), d: int | None = None
    ) -> list[tuple[int, float]]:
        """Epsilon after some rounds up to `rounds`, evenly spread on a logarithmic scale: `(rounds, epsilon)`."""
        at_least("rounds", rounds, 1)
        at_least("points", points, 2)
        chosen = sorted({round(rounds ** (k / (points - 1))) for k in range(points)})
        return [(after, self.epsilon(after, examples=examples, d=d)) for after in chosen]

    def rounds_within(self, rounds: int, examples: Sequence[int] = (), d: int | None = None) -> int:
        """How many of `rounds` rounds the budget pays for; all of them without one."""
        if self.budget is None or self.epsilon(rounds, examples=examples, d=d) <= self.budget:
            return rounds
        fits, beyond = 0, rounds
        while beyond - fits > 1:
            middle = (fits + beyond) // 2
            within = self.epsilon(middle, examples=examples, d=d) <= self.budget
            fits, beyond = (middle, beyond) if within else (fits, middle)
        return fits

    def record(self, after: int, examples: Sequence[int] = (), d: int | None = None) -> EpsilonRecord:
        """The first of `records`: what is said where there is room for one number."""
        return self.records(after, examples, d)[0]

    def records(self, after: int, examples: Sequence[int] = (), d: int | None = None) -> tuple[EpsilonRecord, ...]:
        """The complete statements after so many rounds; the one against the server first, where there is one.

        Args:
          after: rounds.
          examples: how many each client holds; needed for examples.
          d: trained values; needed for distributed noise.
        """
        return records(self, after, examples, d)

    def event(self, after: int, examples: Sequence[int] = (), d: int | None = None) -> DpEvent | str:
        """dp-accounting's description of what `record` accounts for; words where it has none."""
        return described(self, after, examples, d)

    def participations(self, after: int) -> int:
        """Most rounds, of `after`, that one client can have joined."""
        joined = ceil(after * self.sample_rate - 1e-9) if self.sampling == "cyclic" else after
        return joined if self.max_participations is None else min(joined, self.max_participations)
