"""Tests share the machine's cores, as the workers of a Ray do."""

import os

from cluster.local import SLEEPING_THREADS

os.environ.setdefault(*SLEEPING_THREADS)
