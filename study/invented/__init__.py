"""Invented metrics: what no pretraining can know, added to a real student on the pages of the user's own FinQA files.

metrics      the made-up names and their formulas
pages        pages whose table can be asked for them, with fresh numbers, and what is asked of them
phrasings    the wording of questions
rows         train rows of every arm, test, dev and documents of the dictionaries, as CSVs that main.py reads
plan         arms, seeds and sizes; the commands that fine-tune and evaluate
gates        what must hold before a dictionary is trained; text_only: what the questions' text alone gives away
diff/        the second half: ceilings, dictionaries, items, carrying
verdicts     D1 to D4 from the tables alone; inference: their statistics
"""
