"""What every experiment needs.

Modules:

  workdir        whose folder it is, and with which settings
  checkpoint     states that survive kills and notice damage
  metric_stream  measurements, one JSON object a line
  inputs         what it reads, by sha256
  processes      devices, hosts, and signals that end a run
  progress       a bar for people
  figures        the look of all figures, figure_data their numbers as CSV
  report         a self-contained page
  errors         what is the user's to mend
"""
