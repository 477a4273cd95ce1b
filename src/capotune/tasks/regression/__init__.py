"""Regression: one number for each text, or several, with an interval that holds the true one nine times in ten."""

from capotune.tasks.regression.task import Regression

__all__ = ["TASK", "Regression"]

TASK = Regression
