"""Quantization of the hub: what a recipe makes of a program, before any converter sees it.

A quantized program is an ordinary one in which weights are made by the operators of `handheld.export.quantize.ops` from
integers, tables and masks, and activations pass pairs of `quantized_decomposed.quantize_per_tensor` and
`dequantize_per_tensor`, one `dequantize` per user. It runs in eager PyTorch, which is the reference for every file made
of it: all formats store the same integers. Each format turns these operators into its own
(`handheld.export.formats`).
"""
