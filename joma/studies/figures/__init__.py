"""The figures and the table of JoMA: one study a file."""
