"""Reconstruction from the gradients of low-rank adapters, over one round or several."""

from privfm.attacks.reconstruction.lora.attack import LoRAReconstruction

__all__ = ["LoRAReconstruction"]
