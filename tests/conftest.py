import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
settings.register_profile("same every time", derandomize=True, deadline=None, database=None, max_examples=40)
settings.load_profile("same every time")
