"""Pretraining: the bit-wise objective, cross-frame error correction, random frame mask, the loop over stages, export."""
