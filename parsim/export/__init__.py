"""What parsim knows, written for other programs."""
