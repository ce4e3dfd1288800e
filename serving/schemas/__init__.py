"""Requests and answers of the endpoint as typed schemas, and the messages between replicas."""
