"""The report of a run: a page, the same in Markdown, and all numbers as rows."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from pyro_scvi.export import html_page
from pyro_scvi.paper.budget import QUICK, Budget
from pyro_scvi.paper.experiment import Experiment, Picture
from pyro_scvi.paper.layout import TEXTS, Layout, laid_out
from pyro_scvi.paper.rows import Row
from pyro_scvi.paper.steps import Results

PAGE, MARKDOWN, CSV, JSON = "index.html", "report.md", "rows.csv", "rows.json"
FILES = (PAGE, MARKDOWN, CSV, JSON)
COLUMNS = ["experiment", *Row.__dataclass_fields__, "command"]

TITLE = "Tables and figures of Lopez et al. (2017), made again"
WIDEST = 900  # CSS pixels of a picture


@dataclass(frozen=True)
class Section:
    """Results of one experiment, and the command that reproduces it."""

    experiment: Experiment
    rows: list[Row]
    pictures: list[Picture]
    seconds: float
    command: str

    @property
    def paragraphs(self) -> list[str]:
        """The experiment's text, and how long it took."""
        return (
            [*self.experiment.text, f"CPU time of all steps: {_duration(self.seconds)}."]
            if self.seconds
            else [*self.experiment.text]
        )


def write(experiments: Sequence[Experiment], results: Results, budget: Budget, folder: Path, about: str) -> None:
    """Write the page, the Markdown, the pictures and the rows of experiments into a folder.

    ``about`` gives the versions they were computed with. Missing steps are computed.
    """
    sections = [_section(experiment, results, budget, folder) for experiment in experiments]
    notes = introduction(budget)
    (folder / PAGE).write_text(html(sections, notes, about), encoding="utf-8")
    (folder / MARKDOWN).write_text(markdown(sections, notes, about), encoding="utf-8")
    table = pd.DataFrame([record for section in sections for record in records(section)], columns=COLUMNS)
    table.to_csv(folder / CSV, index=False)
    (folder / JSON).write_text(json.dumps(json.loads(table.to_json(orient="records")), indent=1) + "\n")


def introduction(budget: Budget) -> list[str]:
    """Text that applies to every table, with a warning if the budget is too small to mean anything."""
    quick = (
        "This is a quick run on a few cells and epochs: it shows that every step works, its numbers mean nothing. "
        "Numbers of cells, epochs, draws and seeds in the texts are those of a full run."
    )
    return [
        *[quick] * (budget == QUICK),
        "Value ± error, with its kind and the number n behind it in the column's name or the table's; a letter in a "
        "header leads to its full name, a number in square brackets to a note, both under the table. NA is a number "
        "that was asked for and is not there, for the reason noted. A dash stands where a system has no such quantity "
        "(no latents to condition on or refit, no bound, no probability of dropout, no seed, no fit of its own) or was "
        "not asked for it. The column paper holds what Lopez et al. (2017) printed in that place, if anything. CPU s "
        "is the mean over the seeds.",
    ]


def records(section: Section) -> list[dict[str, Any]]:
    """The rows as JSON: NaN becomes null, seeds a text such as "0 1 2"."""
    return [
        {
            "experiment": section.experiment.name,
            **{name: None if _is_nan(value) else value for name, value in asdict(row).items()},
            "seeds": " ".join(map(str, row.seeds)),
            "command": section.command,
        }
        for row in section.rows
    ]


def read_rows(file: Path) -> list[Row]:
    """The rows of a CSV file that :func:`write` wrote."""
    texts = {name: str for name in ("experiment", "data", "system", "quantity", "spread", "seeds", "note", "command")}
    numbers = ["value", "error", "seconds", "paper"]
    table = pd.read_csv(file, dtype=texts, keep_default_na=False, na_values={name: [""] for name in numbers})
    names = Row.__dataclass_fields__
    records = [{str(name): value for name, value in line.items() if name in names} for line in table.to_dict("records")]
    return [Row(**{**line, "seeds": tuple(map(int, line["seeds"].split()))}) for line in records]


def html(sections: Sequence[Section], notes: Sequence[str], about: str) -> str:
    """One page that needs no other file."""
    parts: list[html_page.Section] = [("", list(notes))]
    for section in sections:
        blocks: list[str] = section.paragraphs
        for layout in laid_out(section.rows):
            blocks += [html_page.subheading(layout.heading)] if layout.heading else []
            blocks += [_html_table(layout), *[html_page.footnotes(_under(layout))] * bool(_under(layout))]
        blocks += [_html_picture(picture) for picture in section.pictures]
        parts.append((section.experiment.title, [*blocks, html_page.code(section.command)]))
    return html_page.page(TITLE, [*parts, ("Versions", [about])])


def markdown(sections: Sequence[Section], notes: Sequence[str], about: str) -> str:
    """The same as a text with its pictures beside it."""
    parts = [f"# {TITLE}", *map(escaped, notes)]
    for section in sections:
        parts += [f"## {escaped(section.experiment.title)}", *map(escaped, section.paragraphs)]
        for layout in laid_out(section.rows):
            parts += [f"**{escaped(layout.heading)}**"] if layout.heading else []
            parts.append(_markdown_table(layout))
            parts += ["\\\n".join(map(escaped, _under(layout)))] * bool(_under(layout))
        for picture in section.pictures:
            parts += [f"![{escaped(picture.alt)}]({picture.file.name})", escaped(picture.caption)]
        parts.append(f"```sh\n{section.command}\n```")
    return "\n\n".join([*parts, escaped(about)]) + "\n"


def escaped(text: str) -> str:
    """Plain text for Markdown, also for a cell of a table: nothing in it is markup."""
    return re.sub(r"([\\`*_<>|\[\]#~$&])", r"\\\1", " ".join(text.split()))


def _under(layout: Layout) -> list[str]:
    """Lines under a table: its columns' full names, then its notes."""
    return [*layout.columns, *[f"[{number}] {note}" for number, note in enumerate(layout.notes, 1)]]


def _section(experiment: Experiment, results: Results, budget: Budget, folder: Path) -> Section:
    steps = {step.key: step for step in experiment.steps(budget)}
    rows = experiment.rows(results, budget)
    seconds = sum(results.of(step).seconds for step in steps.values())
    command = f"python -m pyro_scvi paper {experiment.name} --out DIR{' --quick' if budget == QUICK else ''}"
    return Section(experiment, rows, experiment.pictures(results, budget, folder), seconds, command)


def _html_table(layout: Layout) -> html_page.Html:
    numbers = [i for i, name in enumerate(layout.header) if name not in TEXTS]
    return html_page.table(layout.rows, layout.header, numbers=numbers)


def _html_picture(picture: Picture) -> html_page.Html:
    from matplotlib.image import imread

    png = picture.file.read_bytes()
    return html_page.picture(png, picture.alt, picture.caption, width=min(WIDEST, imread(picture.file).shape[1]))


def _markdown_table(layout: Layout) -> str:
    rule = [":--" if name in TEXTS else "--:" for name in layout.header]
    header, *body = [[escaped(text) for text in line] for line in (layout.header, *layout.rows)]
    texts = [header, rule, *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in texts)


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{seconds / 60:.1f} minutes"


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
