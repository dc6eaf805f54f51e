"""What a trained dictionary says: statistics, classes, tables, figures."""
