"""Forward passes over rows, generation of text, and the scores of both: the same code for runs and for ``evaluate``."""
