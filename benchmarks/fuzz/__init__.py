"""Fuzzing the converters: random small networks, exported everywhere, compared with eager PyTorch, shrunk when wrong."""
