"""The study of `make study`: does a diff of two models find what fine-tuning added?

plan.py          what is trained and measured, at full length and as a rehearsal, and the time it takes
models.py        the fine-tunes, with their accuracy family by family
pairs.py         which two models are compared, and their activations
ceilings.py      what a whole site carries; layer and site are chosen by it
dictionaries.py  every method, seed and pair trained
measures.py      what each dictionary found of the known answer, and what its latents cause
tables.py        the CSVs; figures.py the figures

study/work.py has the steps, which can be killed and started again; study/page.py the tables of docs/study.md.
"""
