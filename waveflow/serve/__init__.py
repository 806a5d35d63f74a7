"""`waveflow serve`: speech over HTTP."""
