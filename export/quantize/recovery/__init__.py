"""Recovering what quantization costs, on the hub: without labels, from the float program and calibration batches.

    store = rounding.Rounding(prepared, batches)              weights rounded with regard to a layer's inputs
    quantized = apply.quantize(prepared, recipe, batches, store=store)
    found = steps.recovered(prepared, quantized, batches)     channels' means and deviations as they were; training

All give programs with the same operators, and the same schemes, bits and blocks: only numbers change. What each gained,
and where it did harm, is in docs/recovery.md.
"""
