"""Studies of what the matrices of a layer are; public module: monarch."""
