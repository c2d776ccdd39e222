"""How rows travel: what the server learns of them, and what that costs."""

from privfm.defenses.channels.bfv import BFV
from privfm.defenses.channels.ckks import CKKS
from privfm.defenses.channels.gram import CKKSGram
from privfm.defenses.channels.grouped import Grouped
from privfm.defenses.channels.masks import PairwiseMasks
from privfm.defenses.channels.pad import RLWEPad
from privfm.defenses.channels.plaintext import Plaintext
from privfm.defenses.channels.selective import Selective

__all__ = ["BFV", "CKKS", "CKKSGram", "Grouped", "PairwiseMasks", "Plaintext", "RLWEPad", "Selective"]
