"""The stages of a plan: which layers lie on which of them, and how many of these are recomputed."""
