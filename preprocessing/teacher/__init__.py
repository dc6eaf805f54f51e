"""Who writes the programs: the library behind preprocessing.process_finqa_code_generation.

teachers         a teacher takes questions and gives replies; the one that compiles gold programs
openai_teacher   the one that asks a model; its parts:
config             its settings and flags
journal            what was asked and answered, and paid for
conversation       what to ask next about a question, from the journal
chat_request       one request, and what its outcome means
asking             many requests at once; throttle: how many
prices             what it costs, and will cost
batches            the same requests through the Batch API; batch_teacher: submit, status, fetch
"""
