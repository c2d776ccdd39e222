"""Pairwise masks: the protocol in two halves, its graph of neighbours, its shares and its masks."""

from privfm.defenses.channels.masks.channel import PairwiseMasks

__all__ = ["PairwiseMasks"]
