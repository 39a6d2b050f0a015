"""What studies of systems are tried on.

associations         the task of `recall`: what a relation says of a subject
facts                the task of `retrieval`: facts, and questions about some
grid_scenes          the tasks of `grid`: marks, and boxes that a word names
instructions         the task of `drift`, and a head that is planted in a model
kept_tokens          answers of its models from the few tokens that are kept
pair_texts           the texts and models of `pairs`
positional_network   the networks of `positional`, and their lists
reuse_subject        the models of `reuse`, and their text
selector_choices     what the selectors of `selection` choose, and its weight
"""
