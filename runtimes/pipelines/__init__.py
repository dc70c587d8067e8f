"""Pipelines: what apps do with several artifacts, or with one whose inputs and outputs are no tensors to a person."""
