"""The theorems of JoMA, and what follows from them: one study a file."""
