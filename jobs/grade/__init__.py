"""`scalp grade` and `scalp results`: bulk grading, each image accounted for exactly once."""
