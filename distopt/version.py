"""The package's version, read by setuptools and compared across ranks at attach."""

__version__ = "0.1.0"
