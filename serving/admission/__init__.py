"""Admission control: limits of requests, bytes and pixels, fair shares of owners, decoding threads."""
