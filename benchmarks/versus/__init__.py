"""Side by side, in one run, on this machine: handheld's artifacts and the converters' own defaults."""
