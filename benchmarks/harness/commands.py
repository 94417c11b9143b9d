"""Commands: their parser, the command line stored with a table, and a module run in a process of its own."""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence


def parser_of(module: str, description: str | None) -> argparse.ArgumentParser:
    """Parser of ``python -m module``, its description shown as it is written."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(f"python -m {module}", description=description, formatter_class=formatter)


def command_line(module: str, arguments: Sequence[str] | None) -> str:
    """The command that runs a module with these arguments; None are those of this process."""
    return shlex.join(["python", "-m", module, *(sys.argv[1:] if arguments is None else arguments)])


def printed_by(module: str, *arguments: str) -> str:
    """Run a module in a new process with one thread and return what it prints; its errors go where ours go."""
    command = [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
