"""Ways into other people's federated code. Each is imported with what it needs; this page needs torch and numpy."""

from privfm.plugins.adapter_folders import aggregate_adapter_folders
from privfm.plugins.arrays import aggregate_arrays
from privfm.plugins.changes import Unusable
from privfm.plugins.loops import LoopResult, StateDictServer, aggregate_state_dicts

__all__ = [
    "LoopResult",
    "StateDictServer",
    "Unusable",
    "aggregate_adapter_folders",
    "aggregate_arrays",
    "aggregate_state_dicts",
]
