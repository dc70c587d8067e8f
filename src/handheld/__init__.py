"""handheld: lands neural networks on phones, and proves that every converted file computes what the model computes."""

__version__ = "0.1.0"
