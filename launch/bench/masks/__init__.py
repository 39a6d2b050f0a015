"""What masks of twelve families cost, flash and block-sparse."""
