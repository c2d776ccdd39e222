"""Scores in, epsilon out: bounds that hold, estimates that do not, and checks of the mechanism."""

from privfm.attacks.audit.directions import GradientCanaries, RandomDirections
from privfm.attacks.audit.ghosts import GhostCanaries
from privfm.attacks.audit.texts import InsertedSecrets, MislabelledCanaries, OutOfDistributionTexts

__all__ = [
    "GhostCanaries",
    "GradientCanaries",
    "InsertedSecrets",
    "MislabelledCanaries",
    "OutOfDistributionTexts",
    "RandomDirections",
]
