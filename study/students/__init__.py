"""Real students on real FinQA: accuracy, settings, seeds, learning curve, and the diff of one of them.

plan        every command, and what must come before it
jobs        running them, several at a time on every GPU
tables      what they left -> docs/reference/finqa; page: docs/finqa.md
"""
