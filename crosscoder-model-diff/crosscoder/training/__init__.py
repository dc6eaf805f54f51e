"""Training a dictionary: loss, schedule, threshold, resuming."""
