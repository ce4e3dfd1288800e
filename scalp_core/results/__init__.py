"""Results of bulk grading: schema of the rows, export formats, queries, drift, progress."""
