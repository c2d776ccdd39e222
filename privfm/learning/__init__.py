"""Data, models, tasks and local training. Knows nothing of federation, defenses or attacks."""

from privfm.learning.adapter_kinds import IA3, BitFit, LoRA, PromptTuning, WholeModel
from privfm.learning.docstrings import Docstrings
from privfm.learning.learner import ModelLearner
from privfm.learning.models import (
    CausalLanguageModel,
    MeanPooledClassifier,
    PlainCNN,
    SequenceClassifier,
    SmallCNN,
    VisionTransformer,
)
from privfm.learning.one_step import OneStep
from privfm.learning.partitions import IID, Dirichlet, Natural, Shards, Sorted
from privfm.learning.shadows import ShadowAdapters, logits_of, signals_of, token_log_probabilities_of, train_shadows
from privfm.learning.soteria import Soteria
from privfm.learning.sources import Digits, ImageArrays, ImageData, TextData
from privfm.learning.splits import SplitShares, split
from privfm.learning.tasks import CausalLM, ImageClassification, SequenceClassification
from privfm.learning.training import SGD, AdamW, OwnTraining, Schedule
from privfm.learning.workbench import Workbench

__all__ = [
    "AdamW",
    "BitFit",
    "CausalLM",
    "CausalLanguageModel",
    "Digits",
    "Dirichlet",
    "Docstrings",
    "IA3",
    "IID",
    "ImageArrays",
    "ImageClassification",
    "ImageData",
    "LoRA",
    "MeanPooledClassifier",
    "ModelLearner",
    "Natural",
    "OneStep",
    "OwnTraining",
    "PlainCNN",
    "PromptTuning",
    "SGD",
    "Schedule",
    "SequenceClassification",
    "SequenceClassifier",
    "ShadowAdapters",
    "Shards",
    "SmallCNN",
    "Sorted",
    "Soteria",
    "SplitShares",
    "TextData",
    "VisionTransformer",
    "WholeModel",
    "Workbench",
    "logits_of",
    "signals_of",
    "split",
    "token_log_probabilities_of",
    "train_shadows",
]
