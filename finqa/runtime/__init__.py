"""What every stage stands on: paths, errors, manifests, memory, processes, journals, progress."""
