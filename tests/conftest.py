"""Puts the project's root on sys.path, so that tests import dasc as the scripts do."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
