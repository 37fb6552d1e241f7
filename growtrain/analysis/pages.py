"""A page as a list of blocks, and its two forms: one self-contained HTML file and its Markdown twin, with the same texts and numbers.

All texts of a block are plain: they are escaped here and nowhere else, so a run may be named anything. The HTML needs no network and no
script; figures are inside it. The Markdown refers to them as files.
"""

import html
import re
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True)
class Heading:
    """The title of a section."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """Running text; `strong` sets it off as the page's main statement."""

    text: str
    strong: bool = False


@dataclass(frozen=True)
class Items:
    """A list of sentences; one with a `summary` is folded behind it in HTML."""

    texts: list[str]
    summary: str = ""


@dataclass(frozen=True)
class Table:
    """A table; columns in which every cell is a number, with an interval or a unit, are aligned to the right.

    Of one that is `grouped`, rows that follow each other and begin with the same text have it once in HTML.
    """

    header: list[str]
    rows: list[list[str]]
    grouped: bool = False

    @property
    def numeric(self) -> list[bool]:
        """For each column whether it is aligned to the right."""
        columns = zip(*self.rows, strict=True)
        return [all(_NUMBER.fullmatch(cell) for cell in column) for column in columns] or [False] * len(self.header)


@dataclass(frozen=True)
class Figure:
    """A drawing; `name` is its file name in the Markdown's folder, without the suffix."""

    name: str
    svg: str
    caption: str


@dataclass(frozen=True)
class Listing:
    """Lines of code, none of which contains a line break."""

    lines: list[str]


Block = Heading | Paragraph | Items | Table | Figure | Listing


_NUMBER = re.compile(r"((-|never|first|unknown|x?-?\d[-\d.,/ ]*)( ?\[.*\])?( \(\d+\))?( ?[A-Za-z%]{1,3})?)?")


def compact(header: list[str], rows: list[list[str]], *, grouped: bool = False) -> Table:
    """A table without the columns that are empty in every row."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return Table([header[i] for i in kept], [[row[i] for i in kept] for row in rows], grouped)


def visible(text: str) -> str:
    """Text in which every character can be seen: control, format, unassigned and surrogate ones as their escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def to_html(title: str, blocks: list[Block]) -> str:
    """The page as one HTML file."""
    headings = [block.text for block in blocks if isinstance(block, Heading)]
    links = "\n".join(f'<a href="#{_anchor(text)}">{_html(text)}</a>' for text in headings)
    body = "\n".join(_html_block(block) for block in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_html(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{_html(title)}</h1>\n<nav>{links}</nav>\n{body}\n</body>\n</html>\n"
    )


def to_markdown(title: str, blocks: list[Block], figures: str) -> str:
    """The page as Markdown; its figures are `<figures>/<name>.svg`."""
    return f"# {_markdown(title)}\n\n" + "\n\n".join(_markdown_block(block, figures) for block in blocks) + "\n"


def _html(text: str) -> str:
    return html.escape(visible(text))


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower())


def _html_block(block: Block) -> str:
    match block:
        case Heading(text):
            return f'<h2 id="{_anchor(text)}">{_html(text)}</h2>'
        case Paragraph(text, strong):
            return f'<p class="strong">{_html(text)}</p>' if strong else f"<p>{_html(text)}</p>"
        case Items(texts, summary):
            items = "<ul>" + "".join(f"<li>{_html(text)}</li>\n" for text in texts) + "</ul>"
            return f"<details><summary>{_html(summary)}</summary>\n{items}</details>" if summary else items
        case Table():
            return _html_table(block)
        case Figure(_, svg, caption):
            return f"<figure>\n{svg}<figcaption>{_html(caption)}</figcaption>\n</figure>"
        case Listing(lines):
            return "<pre>" + "\n".join(_html(line) for line in lines) + "</pre>"


def _html_table(table: Table) -> str:
    styles = [' class="number"' if numeric else "" for numeric in table.numeric]

    def cells(tag: str, texts: list[str]) -> list[str]:
        return [f"<{tag}{style}>{_cell(text)}</{tag}>" for style, text in zip(styles, texts, strict=True)]

    def line(cells: list[str]) -> str:
        return f"<tr>{''.join(cells)}</tr>"

    def group(rows: list[list[str]]) -> list[str]:
        first, *others = (cells("td", row) for row in rows)
        if table.grouped and others:
            first[0] = first[0].replace("<td", f'<td rowspan="{len(rows)}"', 1)
            others = [each[1:] for each in others]
        return [line(each) for each in (first, *others)]

    groups = groupby(table.rows, key=lambda row: row[0])
    body = "\n".join(text for _, rows in groups for text in group(list(rows)))
    return f'<div class="table"><table>\n<thead>{line(cells("th", table.header))}</thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _cell(text: str) -> str:
    """A cell's text, in which no line breaks within a flag."""
    return re.sub(r"--[a-z0-9-]+( [\w.]+)?", r'<span class="flag">\g<0></span>', _html(text))


def _markdown(text: str) -> str:
    """Plain text in which nothing is markup, neither Markdown's nor HTML's."""
    return re.sub(r"([\\`*_{}\[\]<>|~#&$])", r"\\\1", visible(text))


def _markdown_block(block: Block, figures: str) -> str:
    match block:
        case Heading(text):
            return f"## {_markdown(text)}"
        case Paragraph(text, strong):
            return f"**{_markdown(text)}**" if strong else _markdown(text)
        case Items(texts, summary):
            items = "\n".join(f"- {_markdown(text)}" for text in texts)
            return f"{_markdown(summary)}:\n\n{items}" if summary else items
        case Table(header, rows):
            rule = ["---:" if numeric else "---" for numeric in block.numeric]
            lines = [[_markdown(text) for text in header], rule, *([_markdown(text) for text in row] for row in rows)]
            return "\n".join(f"| {' | '.join(line)} |" for line in lines)
        case Figure(name, _, caption):
            return f"![{_markdown(caption)}]({figures}/{name}.svg)\n\n{_markdown(caption)}"
        case Listing(lines):
            text = "\n".join(visible(line) for line in lines)
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
            return f"{fence}bash\n{text}\n{fence}"


_STYLE = """
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; color: #111; background: #fff;
  max-width: 1100px; margin: 2rem auto 4rem; padding: 0 20px; }
h1 { font-size: 1.5rem; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; padding-top: .5rem; border-top: 1px solid #ddd; break-after: avoid; }
nav { font-size: .85rem; margin-bottom: 1.2rem; } nav a { margin-right: 1.1em; color: #0072B2; text-decoration: none; }
summary { cursor: pointer; color: #0072B2; }
p, li { max-width: 85ch; overflow-wrap: anywhere; }
p.strong { font-size: 1.1rem; max-width: none; background: #f2f6fa; border-left: 5px solid #0072B2; padding: .7rem 1rem; margin: 1rem 0; }
.table { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid #e3e3e3; max-width: 46ch;
  overflow-wrap: break-word; }
th { border-bottom: 1.5px solid #555; font-weight: 600; overflow-wrap: normal; }
.flag { white-space: nowrap; }
.number { text-align: right; white-space: nowrap; } th.number { white-space: normal; }
figure { margin: 1rem 0 1.4rem; break-inside: avoid; } svg { display: block; width: 100%; height: auto; }
figcaption { font-size: .84rem; color: #444; max-width: 110ch; margin-top: .2rem; }
pre { font-size: .78rem; line-height: 1.45; background: #f6f6f6; padding: .8rem 1rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
@page { size: A4 landscape; margin: 12mm; }
@media print { html { font-size: 12.5px; } body { margin: 0; padding: 0; max-width: none; font-size: 12.5px; } p, li { max-width: none; }
  nav { display: none; } .table { overflow: visible; }
  tr { break-inside: avoid; } thead { display: table-header-group; }
  p.strong, pre { -webkit-print-color-adjust: exact; print-color-adjust: exact; } }
"""
