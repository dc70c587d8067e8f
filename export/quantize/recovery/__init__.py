"""Recovering what quantization costs, on the hub: without labels, from the float program and calibration batches.

Three steps, each optional, cheapest first; `docs` of each say what it gained where it was tried.

    store = rounding.Rounding(prepared, batches)              weights rounded with regard to a layer's inputs
    quantized = apply.quantize(prepared, recipe, batches, store=store)
    quantized = statistics.matched(prepared, quantized, batches)        each channel's mean as it was
    quantized = distillation.tuned(prepared, quantized, batches)        biases and norms, or weights too, trained

All give programs with the same operators, and the same schemes, bits and blocks: only numbers change.
"""
