"""Token classification: a tag for each word, entities (names, parts, dates …) as runs of tagged words."""
