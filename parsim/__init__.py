"""parsim: simulate, choose and run parallel plans for training large language models."""

__version__ = "0.1.0"
