"""The machine that figures were measured on: processor, cores, load, versions of the packages."""

import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = "torch", "pyro-ppl", "scvi-tools", "numpy"


def machine(threads: int, accelerator: str = "") -> dict[str, Any]:
    """CPU model, cores, load averages (1, 5, 15 minutes), Python and package versions, threads of the workers."""
    return {
        "accelerator": accelerator,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        "threads": threads,
        "versions": versions(PACKAGES),
    }


def described(facts: dict[str, Any]) -> str:
    """The machine in a line."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    load = " ".join(map(str, facts["load"]))
    processors = ", ".join(filter(None, [facts["accelerator"], facts["cpu"]]))
    return (
        f"{processors}, {facts['cores']} cores, load {load}, {facts['threads']} thread(s), "
        f"Python {facts['python']}, {versions}"
    )


def cpu_model() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    return {name: version for name in packages if (version := _version(name))}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
