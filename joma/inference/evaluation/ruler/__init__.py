"""The 13 tasks of RULER (arXiv 2404.06654): texts, questions and scores."""
