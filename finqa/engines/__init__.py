"""What writes replies (finqa.generation): vLLM or Hugging Face.

`serving` decides which, and how it gets the adapter.
"""
