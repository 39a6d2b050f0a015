"""Rules of scores and weights: what softmax reads, or what replaces it."""
