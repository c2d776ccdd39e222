"""Scores in, epsilon out: bounds that hold, estimates that do not, and checks of the mechanism."""
