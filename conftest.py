"""The package comes before the files that pytest collects.

A doctest of one file alone would otherwise see a second copy of that file's classes.
"""

import importlib

importlib.import_module("lsoftmax_jax")
