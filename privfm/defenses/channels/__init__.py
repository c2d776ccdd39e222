"""How rows travel: what the server learns of them, and what that costs."""

from privfm.defenses.channels.bfv import BFV
from privfm.defenses.channels.ckks import CKKS
from privfm.defenses.channels.masks import PairwiseMasks
from privfm.defenses.channels.plaintext import Plaintext

__all__ = ["BFV", "CKKS", "PairwiseMasks", "Plaintext"]
