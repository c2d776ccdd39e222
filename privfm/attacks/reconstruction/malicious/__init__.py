"""A server that bends the model before it sends it out. No honest-but-curious server does that, and reports say so."""

from privfm.attacks.reconstruction.malicious.adapter_trap import AdapterTrap
from privfm.attacks.reconstruction.malicious.fishing import Fishing
from privfm.attacks.reconstruction.malicious.imprint import Imprint, brightness

__all__ = ["AdapterTrap", "Fishing", "Imprint", "brightness"]
