"""Who writes the programs: the library behind preprocessing.process_finqa_code_generation.

teachers         a teacher takes questions and gives replies; the one that compiles gold programs
openai_teacher   the one that asks a model; its parts:
config             its settings and flags
conversation       what to ask next about a question, from the journal
batch              the same requests through the Batch API: submit, status, fetch

How a model is asked, paid for and kept in a journal is in finqa.chat.
"""
