"""Fuzzing the converters: random small networks, exported everywhere, compared with PyTorch, shrunk when wrong."""
