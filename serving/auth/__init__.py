"""API keys, scopes, and the check of each request."""
