"""The page that shows what a model attends to, and what policies keep."""
