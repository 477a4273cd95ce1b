"""Token classification: a tag for each word, entities (names, parts, dates …) as runs of tagged words. The head on the
words' states is solved to convergence, then other methods train on from it."""

from capotune.tasks.token_classification.facade import Tagger
from capotune.tasks.token_classification.tagging import FoundEntity, Tagging
from capotune.tasks.token_classification.task import TokenClassification

__all__ = ["TASK", "FoundEntity", "Tagger", "Tagging", "TokenClassification"]

TASK = TokenClassification
