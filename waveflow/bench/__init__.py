"""What `waveflow bench` measures, and with what care."""
