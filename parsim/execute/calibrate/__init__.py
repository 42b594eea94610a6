"""Microbenchmarks of this machine, as a hardware profile."""
