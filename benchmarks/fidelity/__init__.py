"""Is it right: every artifact against the model's own outputs."""
