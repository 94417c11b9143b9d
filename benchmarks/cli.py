"""Command line: choose rows, measure them, print the table, write and compare it."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import benchmarks
from benchmarks.harness import report
from benchmarks.harness.commands import command_line, parser_of
from benchmarks.harness.interleaving import Outcome, Row
from benchmarks.harness.machine import described, machine
from benchmarks.harness.paths import DATA
from benchmarks.harness.processes import Bench, TaskError, Unavailable
from benchmarks.harness.results import failed, skipped
from benchmarks.quality import learning_curves
from benchmarks.rows.registry import cpu_rows, gpu_rows

QUICK_NOTE = "Tiny sizes: everything ran, the figures mean nothing.\n"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of("benchmarks", benchmarks.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    cpu = commands.add_parser("cpu", help="against scvi-tools on the CPU; process CPU time is the figure")
    cpu.set_defaults(run=run_cpu)
    cpu.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of fits whose quality is judged")
    cpu.add_argument("--data", type=Path, default=DATA, help="folder with the real data")
    cpu.add_argument("--threads", type=int, default=1, help="of every process that measures")
    cpu.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    cpu.add_argument("--plots", type=Path, help="folder for pictures of held-out quality against time")
    gpu = commands.add_parser("gpu", help="against scvi-tools on a CUDA device; wall time is the figure")
    gpu.set_defaults(run=run_gpu)
    gpu.add_argument("--dry-run", action="store_true", help="the same code on the CPU with tiny sizes")
    truth = commands.add_parser("truth", help="inference against quadrature, exact arithmetic and known latents")
    truth.set_defaults(run=run_truth)
    truth.add_argument("--cells", type=int, default=200, help="simulated cells of most checks, 20 or more")
    for command in (cpu, gpu):
        command.add_argument("--rows", nargs="+", metavar="ROW", help="names of rows, or how they begin")
        command.add_argument("--list", action="store_true", help="name the rows and stop")
        command.add_argument("--rounds", type=int, default=3, help="measurements of every system, by turns")
        command.add_argument("--out", type=Path, help="JSON file for the table")
        command.add_argument("--compare", type=Path, help="an earlier JSON file: say what changed")
    return parser.parse_args(arguments)


def chosen(rows: dict[str, Row], names: Sequence[str] | None) -> list[Row]:
    """The rows whose name is, or begins with, one of ``names``; all of them for None.

    Raises
    ------
    SystemExit
        If a name matches no row.
    """
    if names is None:
        return list(rows.values())
    if unknown := [name for name in names if not any(row.startswith(name) for row in rows)]:
        raise SystemExit(f"no row is named {', '.join(unknown)}; the rows are {', '.join(rows)}")
    return [row for name, row in rows.items() if name.startswith(tuple(names))]


def measured(rows: Sequence[Row], bench: Bench) -> dict[str, Outcome]:
    """Run the rows one after the other; a row that cannot run or fails gives the reason, and the others go on."""
    outcomes = {}
    for row in rows:
        started = time.perf_counter()
        try:
            outcomes[row.name] = row.run(bench)
        except Unavailable as reason:
            outcomes[row.name] = Outcome([skipped(row.name, str(reason))], {})
        except TaskError as error:
            sys.stderr.write(f"{error}\n")
            outcomes[row.name] = Outcome([failed(row.name, str(error))], {})
        sys.stderr.write(f"{row.name}: {time.perf_counter() - started:.0f} s\n")
    return outcomes


def report_on(
    rows: dict[str, Row], bench: Bench, options: argparse.Namespace, accelerator: str = ""
) -> dict[str, Outcome]:
    """Measure, print the table with machine and command, compare it and write it."""
    about = {"command": options.line, "machine": machine(bench.threads, accelerator)}
    with bench:
        outcomes = measured(chosen(rows, options.rows), bench)
    lines = [line for outcome in outcomes.values() for line in outcome.lines]
    sys.stdout.write(QUICK_NOTE if bench.quick else "")
    sys.stdout.write(report.table(lines) + "\n" + described(about["machine"]) + "\n" + about["command"] + "\n")
    if options.compare:
        sys.stdout.write("\n" + report.changes(report.read(options.compare), lines))
    if options.out:
        report.write(options.out, lines, about, {name: outcome.details for name, outcome in outcomes.items()})
    return outcomes


def run_cpu(options: argparse.Namespace) -> None:
    """The command ``cpu``."""
    rows = cpu_rows(quick=options.quick)
    if options.list:
        return list_rows(rows)
    bench = Bench(options.rounds, tuple(options.seeds), options.threads, options.data, options.quick)
    bench.whole_curves = options.plots is not None
    outcomes = report_on(rows, bench, options)
    if options.plots:
        for path in learning_curves.save(options.plots, {name: outcome.details for name, outcome in outcomes.items()}):
            sys.stdout.write(f"{path}\n")
    return None


def run_gpu(options: argparse.Namespace) -> None:
    """The command ``gpu``.

    Raises
    ------
    SystemExit
        If there is no CUDA device and this is no dry run.
    """
    rows = gpu_rows(dry=options.dry_run)
    if options.list:
        return list_rows(rows)
    accelerator = "none, a dry run" if options.dry_run else cuda_device()
    report_on(rows, Bench(options.rounds, quick=options.dry_run), options, accelerator)
    return None


def run_truth(options: argparse.Namespace) -> None:
    """The command ``truth``; the exit code says whether all rows hold.

    Raises
    ------
    SystemExit
        If a row does not hold.
    """
    from benchmarks.truth import table as truth  # it imports torch, which processes that start others need not

    found = truth.table_of(options.cells)
    sys.stdout.write(truth.printed(found) + options.line + "\n")
    if not found.holds.all():
        raise SystemExit(1)


def list_rows(rows: dict[str, Row]) -> None:
    """Print their names."""
    sys.stdout.write("\n".join(rows) + "\n")


def cuda_device() -> str:
    """Name of the CUDA device; exit if there is none."""
    import torch  # large, and the other command's peaks of memory are measured in children of this process

    if not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device; --dry-run tries the same code on the CPU, with tiny sizes")
    return torch.cuda.get_device_name()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark that the command line asks for."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(given)
    options.line = command_line("benchmarks", given)
    options.run(options)
