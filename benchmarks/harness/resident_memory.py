"""Peak resident memory of a process."""

import resource
import sys
from pathlib import Path


def peak_megabytes() -> float:
    """Largest resident memory of this process so far, in units of 10^6 bytes; since its start, not its parent's."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's figure starts from what the parent held when it started this process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
