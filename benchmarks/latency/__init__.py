"""How fast: measuring, and the statistics of what was measured."""
