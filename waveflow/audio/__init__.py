"""Audio and mel spectrograms: files, transforms, refinement."""
