"""Corpora, the training cache, and the segments that training draws from it."""
