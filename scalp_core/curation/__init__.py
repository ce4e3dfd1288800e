"""From examined images to a data set: near-duplicates, groups, splits, audit, pseudonyms."""
