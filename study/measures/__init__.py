"""What was found, held against a known answer."""
