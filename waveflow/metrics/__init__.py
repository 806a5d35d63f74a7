"""Figures of synthesised speech, each a small function, and their table for a model."""
