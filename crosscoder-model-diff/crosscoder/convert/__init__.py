"""Dictionaries in and out of the files of other libraries, and latents as Neuronpedia's JSON.

files.py                 tensors and settings of somebody else's folder, with nothing in it run
dictionary_learning.py   BatchTopKCrossCoder of dictionary_learning, and the code of the published run
sae_lens.py              a difference SAE as SAELens' JumpReLU SAE
neuronpedia.py           the dashboard's latents and examples as SAEDashboard's batches
"""
