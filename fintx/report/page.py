"""Pages: one HTML file that needs nothing else, with its figures and tables as files beside it.

<folder>/index.html       everything: styles, figures as SVG; no script, no network
<folder>/figures/*.svg, *.png
<folder>/tables/*.csv
"""

from __future__ import annotations

import datetime
import functools
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jinja2

import fintx
from fintx.errors import FintxError
from fintx.files import replacing
from fintx.report.figures import Picture
from fintx.report.format import Tone
from fintx.report.table import Table

PAGE = "index.html"


@dataclass(frozen=True)
class Prose:
    """A paragraph, or a list of points."""

    text: str | tuple[str, ...]
    kind: Literal["plain", "note", "warning"] = "plain"

    @property
    def points(self) -> tuple[str, ...]:
        """Of a list; empty for a paragraph."""
        return () if isinstance(self.text, str) else self.text


@dataclass(frozen=True)
class Text:
    """A file, shown as it is; closed until it is asked for."""

    title: str
    body: str


Block = Prose | Table | Picture | Text


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    name: str
    """Anchor."""
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str
    kicker: str
    """A line above the title."""
    question: str
    answer: str
    """One sentence, or a few."""
    tone: Tone
    warnings: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    """(what, value) in a row below the answer."""
    sections: tuple[Section, ...]
    footer: str

    @property
    def tables(self) -> tuple[Table, ...]:
        """Every table."""
        return tuple(block for section in self.sections for block in section.blocks if isinstance(block, Table))

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """Every figure."""
        return tuple(block for section in self.sections for block in section.blocks if isinstance(block, Picture))


def footer() -> str:
    """Who made it, when."""
    today = datetime.datetime.now(datetime.UTC).isoformat(sep=" ", timespec="minutes")
    return f"Made by fintx {fintx.__version__} on {today} from records and predictions alone."


def folder_name(studies: Iterable[str]) -> str:
    """Of a page on several studies: their names, cut where they are too many for a file system."""
    name = "+".join(studies)
    return name if len(name) <= 120 else f"{name[:110]}+more"


def render(page: Page) -> str:
    """The page as HTML."""
    return _template().render(page=page, kind=lambda block: type(block).__name__)


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2")


def write(page: Page, folder: Path) -> Path:
    """Write the page with its files; what an earlier report left there is replaced.

    Returns:
        The HTML file.

    Raises:
        FintxError: it can't be written.
    """
    target = folder / PAGE
    try:
        for name, files in (
            ("figures", {f"{p.name}.svg": p.svg.encode() for p in page.pictures}
             | {f"{p.name}.png": p.png for p in page.pictures}),
            ("tables", {f"{table.name}.csv": table.csv.encode() for table in page.tables}),
        ):  # fmt: skip
            shutil.rmtree(folder / name, ignore_errors=True)
            (folder / name).mkdir(parents=True, exist_ok=True)
            for file, content in files.items():
                (folder / name / file).write_bytes(content)
        with replacing(target) as temporary:
            temporary.write_text(render(page), encoding="utf-8")
    except OSError as error:
        raise FintxError(f"{target}: can't be written: {error.strerror}; fix that and run the command again") from error
    return target
