"""Text to speech: a flow over mel frames that text steers."""
