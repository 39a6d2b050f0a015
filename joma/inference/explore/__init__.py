"""A page to look at: which tokens a model attends to, and what policies keep.

`explore` reads a text and gives a `view.View`, which is a page of HTML:
`measure` reads attention, `evictions` runs cache policies, `levels` and
`streams` make numbers small, and `document` puts them into the files of
`page/`. `beside` makes the pages beside reports.
"""
