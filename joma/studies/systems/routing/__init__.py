"""Studies of routers: which heads, layers or branches take part."""
