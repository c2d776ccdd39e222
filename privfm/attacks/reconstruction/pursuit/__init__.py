"""Attention-Jacobian pursuit: exact sentences from the full gradient of an encoder."""

from privfm.attacks.reconstruction.pursuit.attack import AttentionPursuit

__all__ = ["AttentionPursuit"]
