"""The embedded default: makes FinQA-mini and pretrains pocket-mistral."""
