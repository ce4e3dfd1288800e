"""Tests share the machine's cores, as what they test does."""

from cluster.local import share_cores

share_cores()
