"""The crew: thin Ray shells round ``stowray.pipeline``."""
