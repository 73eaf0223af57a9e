"""Hostile input by the million: what is parsed, what may come of it, and the seeds."""
