"""The version of this code, installed or not."""

__version__ = "0.1.0"
