"""Measurements: each module is one command of ``kvtoolkit bench``."""
