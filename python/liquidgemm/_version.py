"""The version of the package, which is that of the workspace."""

__version__ = "0.1.0"
