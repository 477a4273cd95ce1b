"""A task in one folder, outside the package: a number for each text.

``data`` reads texts with a column ``score``, ``task`` is the task on its base, ``run`` its part of a run.
"""
