"""RULER through caches that evict: three protocols, grid and leaderboard."""
