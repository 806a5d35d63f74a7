"""Published WaveGlow checkpoints: read without running them, and turned into ours."""
