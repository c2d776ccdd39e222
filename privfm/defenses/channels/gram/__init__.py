"""Inner products under encryption: what robust rules need, and nothing else."""

from privfm.defenses.channels.gram.channel import CKKSGram

__all__ = ["CKKSGram"]
