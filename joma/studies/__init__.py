"""Studies of joint dynamics: one file a figure, theorem or open question.

Each file holds the study's settings, its measurement, its figure and its
caption, and joins them in `STUDY` (`study.Study`). `launch/joma.py` runs them,
`study_report` lays their numbers out, `drawing` has what figures share.
"""
