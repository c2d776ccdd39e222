"""Protections: tensors in, tensors out. They know nothing of federation and plug into anybody's training loop."""

if __name__ != "privfm.defenses":  # the link at the top of the repository is a door for readers, not a package
    raise ImportError(f"import privfm.defenses, not {__name__}: the folder at the repository's root is a link")

from privfm.contracts import Decision
from privfm.defenses.adapter_aggregation import AdapterOutcome, NextAdapters, aggregate_adapters, next_adapters
from privfm.defenses.aggregator import Aggregated, Aggregator
from privfm.defenses.bulyan import Bulyan
from privfm.defenses.clustering_rules import FLAME, ClippedClustering, CosineClustering, SignGuard, flame_noise
from privfm.defenses.coordinate_rules import CoordinateRule, MeaMed, Median, Phocas, TrimmedMean
from privfm.defenses.directional_rules import FLTrust, with_root
from privfm.defenses.foreign import as_rule
from privfm.defenses.geometry import Change, ProductView
from privfm.defenses.gram_rules import (
    CenteredClipping,
    GeometricMedian,
    GramRule,
    JudgingRule,
    Krum,
    MoNNA,
    MultiKrum,
    median_gradient,
)
from privfm.defenses.history_rules import FLDetector, FoolsGold
from privfm.defenses.layerwise_rules import LASA
from privfm.defenses.mean import Mean
from privfm.defenses.pre_aggregation import (
    AdaptiveClipping,
    Bucketing,
    NearestNeighborMixing,
    NormBound,
    PreAggregation,
)
from privfm.defenses.privacy import (
    AdaptiveQuantile,
    Automatic,
    DPPlan,
    EpsilonRecord,
    Flat,
    IntegerNoise,
    LocalSampling,
    PerLayer,
)
from privfm.defenses.reconstruction import GradientPruning
from privfm.defenses.sign_rules import RobustLearningRate, SignMajority
from privfm.defenses.spectral_rules import CovarianceFilter, DivideAndConquer
from privfm.defenses.subset_rules import SMEA, MinimumDiameterAveraging
from privfm.defenses.transforms import Chain, ClientMomentum, Clip, FixedPoint

__all__ = [
    "AdaptiveQuantile",
    "Automatic",
    "Flat",
    "IntegerNoise",
    "LocalSampling",
    "PerLayer",
    "AdapterOutcome",
    "AdaptiveClipping",
    "Aggregated",
    "Aggregator",
    "Bucketing",
    "Bulyan",
    "CenteredClipping",
    "Chain",
    "Change",
    "ClientMomentum",
    "Clip",
    "ClippedClustering",
    "CoordinateRule",
    "CosineClustering",
    "CovarianceFilter",
    "DPPlan",
    "Decision",
    "DivideAndConquer",
    "EpsilonRecord",
    "FLAME",
    "FLDetector",
    "FLTrust",
    "FixedPoint",
    "FoolsGold",
    "GeometricMedian",
    "GradientPruning",
    "GramRule",
    "JudgingRule",
    "Krum",
    "LASA",
    "MeaMed",
    "Mean",
    "Median",
    "MinimumDiameterAveraging",
    "MoNNA",
    "MultiKrum",
    "NearestNeighborMixing",
    "NextAdapters",
    "NormBound",
    "Phocas",
    "PreAggregation",
    "ProductView",
    "RobustLearningRate",
    "SMEA",
    "SignGuard",
    "SignMajority",
    "TrimmedMean",
    "aggregate_adapters",
    "as_rule",
    "flame_noise",
    "median_gradient",
    "next_adapters",
    "with_root",
]
