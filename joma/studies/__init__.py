"""Studies: one file a figure, theorem, open question or attention system.

Each file holds the study's settings, its measurement, its figure and its
caption, and joins them in `STUDY` (`study.Study`). `launch/joma.py` and
`launch/attention.py` run them, `study_report` lays their numbers out, `drawing`
has what figures share; `training` trains small models, `parts` keeps what is
done, `claims` holds it against papers.

Letters, in shapes and in the sentences about them:

  B samples    D width       E entries beside each other   F hidden nodes
  H depths that are compared               J components    K classes
  L depths of a tree, layers               M tokens        Q queries
  R runs (seeds)             S times, records, points of a curve
"""
