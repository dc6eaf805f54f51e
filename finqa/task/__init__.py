"""What a FinQA question is: records, data sets, programs, prompts, answers."""
