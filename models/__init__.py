"""What to ship: the zoo, its inputs, its checkpoints, its probe weights, and what its papers say."""
