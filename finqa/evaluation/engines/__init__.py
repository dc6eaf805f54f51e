"""What writes replies (finqa.evaluation.generation): vLLM or Hugging Face.

`serving` decides which, and how it gets the adapter.
"""
