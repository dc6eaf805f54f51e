"""The second half of the study: what a diff of the base and each fine-tune finds of the metrics that were added.

plan           the sites, methods and lengths; the jobs
ceilings       what a whole site carries, and the primary site; how a patched model's programs are run
dictionaries   recording, settings chosen on the control, training with them
sources        what gives items: dictionaries, directions, figures per token; their injected energy
readings       what both models give at the look-ups of test programs, and on documents
items          each metric against the other fifteen on its page
carrying       the items put into the base: right answers and injected norm
pairs          all of this for one pair of models at one site
tables         the CSVs and run.json; figure: the headline figure
"""
