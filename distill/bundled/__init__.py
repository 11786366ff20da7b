"""The demo's own material: a small public-domain text and two small generations trained on it."""

from pathlib import Path

BUNDLED = Path(__file__).parent
