"""Measurements against the peers, run by hand; not part of the package."""
