"""What a stage needs, against what there is."""
