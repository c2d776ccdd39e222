"""Scores in, epsilon out: bounds that hold, estimates that do not, and checks of the mechanism."""

from privfm.attacks.audit.callables import Audited, audit
from privfm.attacks.audit.clopper_pearson import DeclaredThreshold, SplitThreshold, clopper_pearson
from privfm.attacks.audit.directions import GradientCanaries, RandomDirections
from privfm.attacks.audit.gaussian_fit import gaussian_fit
from privfm.attacks.audit.ghosts import GhostCanaries
from privfm.attacks.audit.guesses import Declared, Guesses, Split, planned, spread
from privfm.attacks.audit.inclusion import inclusion
from privfm.attacks.audit.mechanism import check_mechanism, holm
from privfm.attacks.audit.one_run import one_run
from privfm.attacks.audit.one_run_fdp import ApproximateFamily, Family, GaussianFamily, TabulatedFamily, one_run_fdp
from privfm.attacks.audit.scores import sampled_gaussian_score
from privfm.attacks.audit.size import canaries_needed, ceiling
from privfm.attacks.audit.statements import Bound, Check, Estimate
from privfm.attacks.audit.texts import InsertedSecrets, MislabelledCanaries, OutOfDistributionTexts

__all__ = [
    "ApproximateFamily",
    "Audited",
    "Bound",
    "Check",
    "Declared",
    "DeclaredThreshold",
    "Estimate",
    "Family",
    "GaussianFamily",
    "GhostCanaries",
    "GradientCanaries",
    "Guesses",
    "InsertedSecrets",
    "MislabelledCanaries",
    "OutOfDistributionTexts",
    "RandomDirections",
    "Split",
    "SplitThreshold",
    "TabulatedFamily",
    "audit",
    "canaries_needed",
    "ceiling",
    "check_mechanism",
    "clopper_pearson",
    "gaussian_fit",
    "holm",
    "inclusion",
    "one_run",
    "one_run_fdp",
    "planned",
    "sampled_gaussian_score",
    "spread",
]
