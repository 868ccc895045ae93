"""Puts the repository's root on the path, hides GPUs, whose last digits vary from run to run, and
says how hypothesis draws its examples.

By default they are the same every time; `HYPOTHESIS_PROFILE=explore pytest` draws others.
"""
import os
import sys
from pathlib import Path

from hypothesis import settings

os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

common = dict(deadline=None, database=None)
settings.register_profile("same every time", derandomize=True, max_examples=40, **common)
settings.register_profile("explore", derandomize=False, max_examples=200, print_blob=True, **common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same every time"))
