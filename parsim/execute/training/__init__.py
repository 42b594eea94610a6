"""What a rank trains: its stages of the model, split by torch's own parallel APIs, timed and checked."""
