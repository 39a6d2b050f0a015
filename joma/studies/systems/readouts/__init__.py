"""Studies of read-outs: what vectors of texts, pairs and grids can say."""
