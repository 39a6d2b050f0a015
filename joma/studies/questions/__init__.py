"""Questions that JoMA leaves open: one study a file."""
