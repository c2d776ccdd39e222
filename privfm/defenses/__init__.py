"""Protections: tensors in, tensors out. They know nothing of federation and plug into anybody's training loop."""

if __name__ != "privfm.defenses":  # the link at the top of the repository is a door for readers, not a package
    raise ImportError(f"import privfm.defenses, not {__name__}: the folder at the repository's root is a link")

from privfm.defenses.coordinate_rules import CoordinateRule, TrimmedMean
from privfm.defenses.foreign import as_rule
from privfm.defenses.gram_rules import CenteredClipping, GramRule, Krum, MultiKrum
from privfm.defenses.mean import Mean
from privfm.defenses.pre_aggregation import PreAggregation
from privfm.defenses.privacy import DPPlan, EpsilonRecord
from privfm.defenses.transforms import Chain, Clip

__all__ = [
    "CenteredClipping",
    "Chain",
    "Clip",
    "CoordinateRule",
    "DPPlan",
    "EpsilonRecord",
    "GramRule",
    "Krum",
    "Mean",
    "MultiKrum",
    "PreAggregation",
    "TrimmedMean",
    "as_rule",
]
