"""Arithmetic that several ops share: pairs and parts of floats, sums of log-decays, quantized matrices, norms."""
