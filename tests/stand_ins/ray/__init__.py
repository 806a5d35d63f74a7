"""In the place of Ray, as far as recipes/ray asks for it: one actor, in this process."""
