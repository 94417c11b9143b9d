"""Where the project, further real data, golden outputs and the specification lie."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
DATA = Path(os.environ.get("PYRO_SCVI_DATA", ROOT / "../shared/data"))
GOLDEN = Path(os.environ.get("PYRO_SCVI_GOLDEN", ROOT / "../shared/golden"))
SPEC = Path(os.environ.get("PYRO_SCVI_SPEC", ROOT / "../shared/spec"))
