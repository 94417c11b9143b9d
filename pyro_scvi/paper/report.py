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

TITLE = "Tables and figures of Lopez et al. (2017), reproduced"
WIDEST = 900  # CSS pixels of a picture
SUMMARY, HOW_TO_READ, DETAILS = "Summary", "How to read the tables", "Details of "
CLAIM, FOUND = "The paper:", "Found here:"

READING = (
    "A value stands with its error, as in 1.0 ± 0.1. The kind of error and the number n behind it are in the name of "
    "the "
    "column or of the table.",
    "A letter in a header refers to the full name under the table. A number in square brackets refers to a note there.",
    "NA is a number that could not be computed, for the reason in its note. A dash says that a system has no such "
    "quantity, or was not asked for it. It may have no latents to condition on or refit, no bound, no probability of "
    "dropout, no seed, or no fit of its own.",
    "The column paper has the number that Lopez et al. (2017) printed in that place, if any. CPU s is the mean over "
    "seeds.",
)


@dataclass(frozen=True)
class Section:
    """Results of one experiment, and the command that reproduces it."""

    experiment: Experiment
    rows: list[Row]
    pictures: list[Picture]
    seconds: float
    command: str

    @property
    def found(self) -> list[str]:
        """The sentences of what was found, as far as there are numbers for them."""
        sentences = [finding.sentence(self.rows) for finding in self.experiment.findings]
        return [sentence for sentence in sentences if sentence]

    @property
    def in_summary(self) -> bool:
        """Whether the report opens with this experiment, and with its pictures."""
        return bool(self.experiment.claim)

    @property
    def title(self) -> str:
        """The heading of its tables."""
        return f"{DETAILS}{self.experiment.title}" if self.in_summary else self.experiment.title

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
    """A warning if the budget is too small to mean anything."""
    quick = (
        "This is a quick run on a few cells and epochs. It shows that every step works; its numbers mean nothing. "
        "Numbers of cells, epochs, draws and seeds in the texts are those of a full run."
    )
    return [quick] if budget == QUICK else []


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
    parts: list[html_page.Section] = [("", list(notes)), *_html_summary(sections), (HOW_TO_READ, list(READING))]
    for section in sections:
        blocks: list[str] = section.paragraphs
        for layout in laid_out(section.rows):
            blocks += [html_page.subheading(layout.heading)] if layout.heading else []
            blocks += [_html_table(layout), *[html_page.footnotes(_under(layout))] * bool(_under(layout))]
        blocks += [] if section.in_summary else [_html_picture(picture) for picture in section.pictures]
        parts.append((section.title, [*blocks, html_page.code(section.command)]))
    return html_page.page(TITLE, [*parts, ("Versions", [about])])


def markdown(sections: Sequence[Section], notes: Sequence[str], about: str) -> str:
    """The same as a text with its pictures beside it."""
    parts = [f"# {TITLE}", *map(escaped, notes), *_markdown_summary(sections)]
    parts += [f"## {HOW_TO_READ}", *map(escaped, READING)]
    for section in sections:
        parts += [f"## {escaped(section.title)}", *map(escaped, section.paragraphs)]
        for layout in laid_out(section.rows):
            parts += [f"**{escaped(layout.heading)}**"] if layout.heading else []
            parts.append(_markdown_table(layout))
            parts += ["\\\n".join(map(escaped, _under(layout)))] * bool(_under(layout))
        if not section.in_summary:
            parts += _markdown_pictures(section)
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


def _html_summary(sections: Sequence[Section]) -> list[html_page.Section]:
    blocks: list[str] = []
    for section in [each for each in sections if each.in_summary]:
        blocks += [html_page.subheading(section.experiment.title), f"{CLAIM} {section.experiment.claim}"]
        blocks += [" ".join([FOUND, *section.found])] * bool(section.found)
        blocks += [_html_picture(picture) for picture in section.pictures]
    return [(SUMMARY, blocks)] if blocks else []


def _markdown_summary(sections: Sequence[Section]) -> list[str]:
    parts: list[str] = []
    for section in [each for each in sections if each.in_summary]:
        parts += [f"### {escaped(section.experiment.title)}", f"**{CLAIM}** {escaped(section.experiment.claim)}"]
        found = "\n".join(f"- {escaped(sentence)}" for sentence in section.found)
        parts += [f"**{FOUND}**", found] if found else []
        parts += _markdown_pictures(section)
    return [f"## {SUMMARY}", *parts] if parts else []


def _markdown_pictures(section: Section) -> list[str]:
    return [
        text
        for picture in section.pictures
        for text in (f"![{escaped(picture.alt)}]({picture.file.name})", escaped(picture.caption))
    ]


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
