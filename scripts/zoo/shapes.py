"""Inputs of small modules."""

LINE, IMAGE, VOLUME, ROWS = ((2, 4, 16),), ((2, 4, 8, 8),), ((1, 4, 4, 8, 8),), ((2, 8),)
SEQUENCE = ((2, 5, 8),)
TOKENS = ((2, 12),)
VOCABULARY = 16
"""Largest token plus one."""
