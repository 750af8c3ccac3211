"""The commands of ``python -m cotolora``."""
