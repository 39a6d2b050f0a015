"""Faults in `launch`: flags, scripts, reports."""

TABLE = """
launch/command/flag_config.py
- elif not flag_values[name].using_default_value:
+ elif flag_values[name].value:
? a flag's default overrides what the preset says
@ test_given_flags_are_laid_over_the_base_and_no_others

launch/command/flag_config.py
- return None if text.lower() == "none" else inner.parse(text)
+ return inner.parse(text) if text else None
? none is no word for nothing
@ test_text_becomes_the_value_of_the_field_type

launch/command/flag_config.py
- if not line.isprintable() or line.strip() != line:
+ if not line.isprintable():
? a space at a value's end is lost in a flagfile
@ test_value_without_text_is_refused_by_name

launch/command/flag_config.py
- if math.isnan(value):
+ if math.isnan(value) and text == "NaN":
? nan passes for a number
@ test_error_names_flag_value_and_what_would_be_right

launch/command/flag_config.py
- return repr(value) if isinstance(value, float) else str(value)
+ return f"{value:g}" if isinstance(value, float) else str(value)
? a flagfile rounds numbers
@ test_replay_builds_an_equal_config_whatever_the_base

launch/command/app.py
- if isinstance(error, BrokenPipeError):
+ if isinstance(error, ConnectionAbortedError):
? a closed pipe shows a traceback
@ test_a_reader_that_goes_away_ends_it_quietly

launch/command/app.py
- if error.filename is not None and error.errno in _OF_FILES:
+ if error.filename == "":
? an error of one of the run's files is blamed on stdout
@ test_what_the_machine_lacks_is_one_line

launch/command/app.py
- print("error: " + " ".join(message.splitlines()), file=sys.stderr)
+ print("error: " + " ".join(message.splitlines()))
? errors go where results go
@ test_user_error_is_one_line_and_status_2

launch/bench/harness.py
- "" if row.get(name) is None else _cell(form(row[name]))
+ _cell(form(row[name])) if row.get(name) else ""
? a cell of 0 stays empty
@ test_nothing_is_written_as_nothing_and_zero_as_zero

launch/command/run.py
- held.enter_context(workdir_lib.hold(*asked))
+ workdir_lib.claim(*asked)
? two runs may be at work in one folder
@ test_measures_in_a_claimed_and_locked_folder_then_reports

launch/command/run.py
- except preemption.Stopped as stopped:
+ except KeyboardInterrupt as stopped:
? a run that was asked to stop fails
@ test_a_stop_is_told_and_reports_nothing

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

launch/starters/tpu_vm.sh
- at_end delete_all
+ true
? a slice goes on costing when the run has ended
@ tests/launch/starters/starters_test.py
@ test_a_slice_is_made_used_and_deleted

launch/starters/tpu_vm.sh
- elif ! "${what[@]}" && [[ -n $(state_of_vm) ]]; then
+ elif ! "${what[@]}" && false; then
? a slice that could not be deleted is not named
@ tests/launch/starters/starters_test.py
@ test_a_slice_that_stays_is_named

launch/starters/common.sh
- [[ -z $child ]] || kill "$child" 2>/dev/null || true
+ [[ -z $child ]] || wait "$child" || true
? a signal is heard only when the command ends by itself
@ tests/launch/starters/starters_test.py
@ test_a_signal_ends_it_and_deletes

launch/starters/gke.sh
- printf "'%s'" "${1//\\'/\\'\\'}"
+ printf "'%s'" "$1"
? a quote in a flag ends a word of the manifest
@ tests/launch/starters/starters_test.py
@ test_pods_are_applied_followed_and_deleted
"""
