"""Images read off a gradient by linear algebra: exact where its conditions hold, and no optimisation."""

from privfm.attacks.reconstruction.closed_form.attention import APRIL
from privfm.attacks.reconstruction.closed_form.linear import LinearInversion
from privfm.attacks.reconstruction.closed_form.patches import PatchInversion
from privfm.attacks.reconstruction.closed_form.sparse import SPEAR

__all__ = ["APRIL", "SPEAR", "LinearInversion", "PatchInversion"]
