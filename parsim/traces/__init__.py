"""Measured steps from what other programs recorded: traces of torch's profiler (Kineto)."""
