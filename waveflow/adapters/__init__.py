"""A vocoder in the shapes in which other systems call one. No file here imports its system."""
