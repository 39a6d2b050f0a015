"""Faults in `launch`: flags, scripts, reports."""

TABLE = """
launch/flag_config.py
- elif not flag_values[name].using_default_value:
+ elif flag_values[name].value:
? a flag's default overrides what the preset says

launch/flag_config.py
- return None if text.lower() == "none" else inner.parse(text)
+ return inner.parse(text) if text else None
? none is no word for nothing

launch/flag_config.py
- if not line.isprintable() or line.strip() != line:
+ if not line.isprintable():
? a space at a value's end is lost in a flagfile

launch/flag_config.py
- if math.isnan(value):
+ if math.isnan(value) and text == "NaN":
? nan passes for a number

launch/flag_config.py
- return repr(value) if isinstance(value, float) else str(value)
+ return f"{value:g}" if isinstance(value, float) else str(value)
? a flagfile rounds numbers

launch/app.py
- except BrokenPipeError:
+ except ConnectionAbortedError:
? a closed pipe shows a traceback

launch/app.py
- if error.filename is not None and error.errno in _OF_FILES:
+ if error.filename == "":
? an error of one of the run's files is blamed on stdout

launch/app.py
- print(f"error: {message}", file=sys.stderr)
+ print(f"error: {message}")
? errors go where results go

launch/bench/harness.py
- "" if row.get(name) is None else _cell(form(row[name]))
+ _cell(form(row[name])) if row.get(name) else ""
? a cell of 0 stays empty

launch/run.py
- held.enter_context(workdir_lib.hold(*asked))
+ workdir_lib.claim(*asked)
? two runs may be at work in one folder

launch/run.py
- except preemption.Stopped as stopped:
+ except KeyboardInterrupt as stopped:
? a run that was asked to stop fails

joma/inference/evaluation/report.py
- best = (min if key == "perplexity" else max)(
+ best = max(
? of perplexities the greatest is best
@ test_of_perplexities_the_least_is_best

joma/inference/evaluation/report.py
- half = (parts["high"] - parts["low"]) / 2
+ half = parts["high"] - parts["low"]
? intervals are written twice as wide
@ test_writes_a_report_of_all_tasks

joma/transformer/training/summary.py
- steps = sorted(set.intersection(*(set(run["steps"]) for run in runs)))
+ steps = sorted(set.union(*(set(run["steps"]) for run in runs)))
? runs are compared where one of them was not measured
@ test_runs_meet_at_the_steps_that_all_have

joma/transformer/training/summary.py
- "rebound": end - low,
+ "rebound": start - low,
? the rebound of entropy is its fall
@ test_extremes
"""
