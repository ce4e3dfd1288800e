"""Result rows of bulk grading: schema, formats, queries, drift, report, progress."""
