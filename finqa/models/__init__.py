"""A base model and its adapter: settings, loading, merging, the check of an adapter, the Hub."""
