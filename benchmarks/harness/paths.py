"""Where the repository is, and the folder with the real data."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("PYRO_SCVI_DATA", ROOT / "../shared/data"))
