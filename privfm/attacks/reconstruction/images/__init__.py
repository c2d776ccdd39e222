"""Images by optimisation: guesses whose update is the one observed."""

from privfm.attacks.reconstruction.images.dlg import DLG
from privfm.attacks.reconstruction.images.inverting_gradients import InvertingGradients
from privfm.attacks.reconstruction.images.statistics import GradInversion

__all__ = ["DLG", "GradInversion", "InvertingGradients"]
