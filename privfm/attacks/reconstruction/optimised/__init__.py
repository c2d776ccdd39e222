"""Texts found by optimisation: TAG and LAMP, and the language models that LAMP may lean on."""

from privfm.attacks.reconstruction.optimised.base import OptimisedAttack
from privfm.attacks.reconstruction.optimised.lamp import LAMP
from privfm.attacks.reconstruction.optimised.priors import CausalPrior, LanguagePrior, NGramPrior
from privfm.attacks.reconstruction.optimised.tag import TAG

__all__ = ["LAMP", "TAG", "CausalPrior", "LanguagePrior", "NGramPrior", "OptimisedAttack"]
