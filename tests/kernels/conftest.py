"""Triton is for Linux; elsewhere only the references run, which the tests of models and tokenizers see."""

import sys

if sys.platform != "linux":
    collect_ignore_glob = ["test_*.py"]
