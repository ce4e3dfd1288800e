"""Labels that people give to images: the label log of `scalp review`, decisions, agreement, order."""
