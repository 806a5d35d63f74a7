"""A vocoder in the shapes in which other systems call one. None needs its system to be imported."""
