"""Apps of other people's making, and ours with clocks around it."""
