"""Studies of attention systems: what their papers claim, one study a file."""
