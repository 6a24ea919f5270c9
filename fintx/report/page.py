"""Pages: one HTML file that needs nothing else, with its figures and tables as files beside it.

<folder>/index.html       everything: styles, figures as SVG; no script, no network
<folder>/figures/*.svg, *.png
<folder>/tables/*.csv
"""

from __future__ import annotations

import datetime
import re
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

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip
_TEMPLATES.filters["with_code"] = lambda markup: re.sub(r"`([^`]+)`", r"<code>\1</code>", str(markup))


@dataclass(frozen=True)
class Prose:
    """A paragraph, or a list."""

    text: str | tuple[str, ...]
    kind: Literal["plain", "note", "command"] = "plain"

    @property
    def points(self) -> tuple[str, ...]:
        """The items of a list; empty for a paragraph."""
        return () if isinstance(self.text, str) else self.text


@dataclass(frozen=True)
class Text:
    """A file, shown as it is; folded until opened."""

    title: str
    body: str


Block = Prose | Table | Picture | Text


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    name: str
    """Name of the section's anchor in the page."""
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    """A whole report."""

    folder: Path
    """Where it is written."""
    title: str
    kicker: str
    """A line above the title."""
    question: str
    answer: str
    """One sentence, or a few."""
    tone: Tone
    sections: tuple[Section, ...]
    warnings: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    """(name, value) in a row below the answer."""

    def render(self) -> str:
        """The page as HTML."""
        now = datetime.datetime.now(datetime.UTC).isoformat(sep=" ", timespec="minutes")
        footer = f"Made by fintx {fintx.__version__} on {now} from records and predictions alone."
        template = _TEMPLATES.get_template("page.html.j2")
        return template.render(page=self, footer=footer, kind=lambda block: type(block).__name__)

    def write(self) -> Path:
        """Write the page with its files, replacing those of an earlier report.

        Returns:
            The HTML file.

        Raises:
            FintxError: it can't be written.
        """
        blocks = [block for section in self.sections for block in section.blocks]
        pictures = [block for block in blocks if isinstance(block, Picture)]
        files = {
            "figures": {f"{picture.name}.svg": picture.svg.encode() for picture in pictures}
            | {f"{picture.name}.png": picture.png for picture in pictures},
            "tables": {f"{table.name}.csv": table.csv.encode() for table in blocks if isinstance(table, Table)},
        }
        target = self.folder / "index.html"
        try:
            for subfolder, contents in files.items():
                shutil.rmtree(self.folder / subfolder, ignore_errors=True)
                (self.folder / subfolder).mkdir(parents=True, exist_ok=True)
                for name, content in contents.items():
                    (self.folder / subfolder / name).write_bytes(content)
            with replacing(target) as temporary:
                temporary.write_text(self.render(), encoding="utf-8")
        except OSError as error:
            raise FintxError(f"{target}: can't be written: {error.strerror}; fix that and run it again") from error
        return target


def folder_name(studies: Iterable[str]) -> str:
    """Folder of a page on several studies: their names, cut off if there are too many for a file system."""
    name = "+".join(studies)
    return name if len(name) <= 120 else f"{name[:110]}+more"
