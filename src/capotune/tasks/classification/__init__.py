"""Classification: one label for one text. The head on the pooled states is solved to convergence, then other methods
train on from it."""

from capotune.tasks.classification.facade import Classifier, Prediction
from capotune.tasks.classification.task import Classification

__all__ = ["TASK", "Classification", "Classifier", "Prediction"]

TASK = Classification
