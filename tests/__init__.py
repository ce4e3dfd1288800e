"""Tests share the machine's cores, as the workers of a Ray do."""

import os

# `cluster.local.SLEEPING_THREADS`, which is slow to import.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
