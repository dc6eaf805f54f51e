"""The parts of evaluation (finqa.evaluation), from replies to metrics.md.

evaluation_rows   which rows are scored; finished_evaluations: which are done already
reply_journal     replies as they finish
judging           replies run and held against the labels; voting: several of them; evidence: what they used
predictions, metrics, report, accuracy_figure   what is written
"""
