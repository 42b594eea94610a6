"""`parsim quickstart`."""


def quickstart() -> None:
    """Placeholder."""
