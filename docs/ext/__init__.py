"""What the site needs beyond Sphinx.

docstrings     a docstring of this project as reStructuredText
api            pages of all public names, from sources
tables         tables of policies, systems, kernels and studies, from sources
written_pages  writes both before Sphinx reads
mathml         formulas as MathML, so that no page asks a network for a script
"""
