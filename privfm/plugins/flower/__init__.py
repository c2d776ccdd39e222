"""For people who have a Flower app (1.41, Message API): a strategy around any rule, plan and channel, and client mods.

Three lines change: the import and the name of the strategy in the ServerApp, and the mods of `@app.train` in the
ClientApp. See `docs/plugins_flower.md`.
"""

from importlib.util import find_spec

if find_spec("flwr") is None:
    raise ImportError("privfm.plugins.flower needs Flower: pip install 'privfm[flower]'")

from privfm.defenses.channels.identity_files import make_secrets, write_public
from privfm.plugins.flower.identities import Parties, load_parties
from privfm.plugins.flower.mods import clip_mod, compress_mod, noise_mod
from privfm.plugins.flower.protection import parties_of, protect_mod
from privfm.plugins.flower.records import BrokenReply
from privfm.plugins.flower.replies import Report
from privfm.plugins.flower.strategy import ProtectedStrategy

__all__ = [
    "BrokenReply",
    "Parties",
    "ProtectedStrategy",
    "Report",
    "clip_mod",
    "compress_mod",
    "load_parties",
    "make_secrets",
    "noise_mod",
    "parties_of",
    "protect_mod",
    "write_public",
]
