"""Speed and memory, measured side by side; the recorded results are in benchmarks/results."""
