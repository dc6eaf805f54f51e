"""What every stage shares: the task, the sandbox, models, training, evaluation, and what they all run on."""
