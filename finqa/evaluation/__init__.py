"""Generate, run, judge, report."""
