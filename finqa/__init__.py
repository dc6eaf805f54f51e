"""What every stage shares: records, programs, prompts, the sandbox, answers, students, generation, evaluation."""
