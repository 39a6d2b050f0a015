"""RULER by protocol: grid and leaderboard; several runs beside each other."""
