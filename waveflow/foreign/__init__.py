"""Reads published WaveGlow checkpoints without executing anything in them."""
