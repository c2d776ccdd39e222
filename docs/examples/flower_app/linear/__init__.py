"""A small Flower app, as somebody might have it."""
