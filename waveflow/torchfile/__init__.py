"""Reads what torch.save wrote as plain data, without torch and without running anything."""
