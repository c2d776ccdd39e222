"""Who was trained on: attacks on scores of models, on updates of a run, and the curves that judge them."""
