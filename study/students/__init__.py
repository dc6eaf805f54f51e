"""Real students on real FinQA: accuracy, settings, seeds, learning curve, and the diff of one of them.

plan        every command, and what must come before it
jobs        running them, several at a time on every GPU
results     reading what they left, every answer judged again
tables      results -> docs/reference/finqa and the tables of docs/finqa.md; figures: its plots
"""
