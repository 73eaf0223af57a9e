"""The work itself, in plain Python: no Ray, no printing, no globals."""
