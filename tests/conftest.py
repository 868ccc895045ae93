"""Puts the repository's root on the path, hides GPUs, whose last digits vary from run to run, puts
planes in the place of LightGBM, and says how hypothesis draws its examples.

By default they are the same every time; `HYPOTHESIS_PROFILE=explore pytest` draws others.
"""
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

common = dict(deadline=None, database=None)
settings.register_profile("same every time", derandomize=True, max_examples=40, **common)
settings.register_profile("explore", derandomize=False, max_examples=200, print_blob=True, **common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same every time"))


@pytest.fixture(scope="session", autouse=True)
def planes_for_trees():
    """LightGBM is optional, and no test but one needs it."""
    from worlds import Planes
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "lightgbm", Planes())
        yield


@pytest.fixture(scope="session")
def embedded(tmp_path_factory):
    """All of the embedded text, prepared once for all tests -> the Corpus, its cache."""
    import data
    cache = tmp_path_factory.mktemp("embedded")
    return data.load(cache=cache, progress=None), cache
