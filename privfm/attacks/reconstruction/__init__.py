"""Reconstruction: what an update gives back of the data behind it."""

from privfm.attacks.reconstruction.linear_layer import label_of_one, labels_present, layer_inputs, shared_input

__all__ = ["label_of_one", "labels_present", "layer_inputs", "shared_input"]
