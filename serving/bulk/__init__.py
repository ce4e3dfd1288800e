"""Bulk grading through the endpoint, as Ray jobs."""
