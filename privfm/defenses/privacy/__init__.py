"""Differential privacy: plans, what they are worth, and the noise they add.

`plan` is where to start. `statements` says who observes what, `accounting` what that costs, `calibration` how much
noise an epsilon needs; `clipping` bounds contributions; `releases`, `example_level` and `integer_noise` are what the
server, a client, and all clients together do; `noise`, `discrete_noise`, `correlated_noise` and `distributed` draw it.
"""

from privfm.defenses.privacy.clipping import AdaptiveQuantile, Automatic, Flat, PerLayer
from privfm.defenses.privacy.example_level import LocalSampling
from privfm.defenses.privacy.integer_noise import IntegerNoise
from privfm.defenses.privacy.plan import DPPlan
from privfm.defenses.privacy.statements import EpsilonRecord

__all__ = [
    "AdaptiveQuantile",
    "Automatic",
    "DPPlan",
    "EpsilonRecord",
    "Flat",
    "IntegerNoise",
    "LocalSampling",
    "PerLayer",
]
