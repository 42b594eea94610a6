"""Training whose ranks do not wait: parameter servers, and pipelines without a flush."""
