"""The version of fruitdask."""

__version__ = "0.1.0"
