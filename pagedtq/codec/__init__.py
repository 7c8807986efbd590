"""TurboQuant as mathematics on vectors: rotation, codebook, packing. Knows nothing of pages."""
