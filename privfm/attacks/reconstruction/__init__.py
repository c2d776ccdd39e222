"""Reconstruction: what an update gives back of the data behind it."""

from privfm.attacks.reconstruction.bags import Bag, BagOfWords, bag_of_embedding, bag_of_span
from privfm.attacks.reconstruction.candidates import matched_candidates, pursued_candidates
from privfm.attacks.reconstruction.closed_form import APRIL, SPEAR, LinearInversion, PatchInversion
from privfm.attacks.reconstruction.curious_server import (
    CuriousServer,
    observations,
    received,
    scores_of,
    special_tokens,
    texts_of,
    told,
)
from privfm.attacks.reconstruction.image_scores import ImageScore, perceptual_distance, psnr, score_images, ssim
from privfm.attacks.reconstruction.images import DLG, GradInversion, InvertingGradients
from privfm.attacks.reconstruction.labels import Labels
from privfm.attacks.reconstruction.leakage import LeakageBudget
from privfm.attacks.reconstruction.linear_layer import label_of_one, labels_present, layer_inputs, shared_input
from privfm.attacks.reconstruction.lora import LoRAReconstruction
from privfm.attacks.reconstruction.malicious import AdapterTrap, Fishing, Imprint
from privfm.attacks.reconstruction.optimised import LAMP, TAG, CausalPrior, LanguagePrior, NGramPrior
from privfm.attacks.reconstruction.pursuit import AttentionPursuit
from privfm.attacks.reconstruction.span import SpanSearch
from privfm.attacks.reconstruction.text_models import TextModel, text_model
from privfm.attacks.reconstruction.text_scores import (
    TextScore,
    TokenScore,
    chance_scores,
    score_counts,
    score_texts,
    score_tokens,
    score_words,
)

__all__ = [
    "APRIL",
    "DLG",
    "LAMP",
    "SPEAR",
    "TAG",
    "AdapterTrap",
    "AttentionPursuit",
    "Bag",
    "BagOfWords",
    "CausalPrior",
    "CuriousServer",
    "Fishing",
    "GradInversion",
    "ImageScore",
    "Imprint",
    "InvertingGradients",
    "Labels",
    "LanguagePrior",
    "LeakageBudget",
    "LinearInversion",
    "LoRAReconstruction",
    "NGramPrior",
    "PatchInversion",
    "SpanSearch",
    "TextModel",
    "TextScore",
    "TokenScore",
    "bag_of_embedding",
    "bag_of_span",
    "chance_scores",
    "label_of_one",
    "labels_present",
    "layer_inputs",
    "matched_candidates",
    "observations",
    "perceptual_distance",
    "psnr",
    "pursued_candidates",
    "received",
    "score_counts",
    "score_images",
    "score_texts",
    "score_tokens",
    "score_words",
    "scores_of",
    "shared_input",
    "special_tokens",
    "ssim",
    "text_model",
    "texts_of",
    "told",
]
