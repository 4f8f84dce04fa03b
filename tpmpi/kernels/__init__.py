"""The kernel sets.  Each has the same functions with the same signatures; the model gets one as its argument `ops`."""
