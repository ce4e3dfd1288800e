"""Prometheus metrics, drift and the audit log of the endpoint."""
