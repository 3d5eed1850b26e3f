"""Settings that must come before anything is imported."""

import os

# the machines that run the tests have few cores, and torch's threads wait for each other by spinning
os.environ.setdefault("OMP_NUM_THREADS", "1")
