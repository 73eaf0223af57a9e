"""Stowray stows container images onto machines."""

__version__ = "0.1.0"
