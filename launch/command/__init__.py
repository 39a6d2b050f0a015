"""What every script shares: start and errors, flags, a run and its folder."""
