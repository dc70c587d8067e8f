"""Side by side with the converters' own quantizers, in one run, on the same inputs: size, accuracy, speed."""
