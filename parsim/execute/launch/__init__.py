"""Ranks started, watched, started again, and what each of them does with its cases."""
