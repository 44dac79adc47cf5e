"""The reference of all configuration keys, read from their declarations: the text of `--help`, and
the page docs/configuration.md, which `python -m zppo_mm.config.help > docs/configuration.md`
prints.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import Field, dataclass, fields, is_dataclass
from typing import Any, get_type_hints

from zppo_mm.config.keys import declared, default_of, entry_type
from zppo_mm.config.schema import RunConfig
from zppo_mm.methods import METHODS

LINE_WIDTH = 100
_PAGE_HEAD = """# Configuration

This page is printed from the declarations in `zppo_mm/config/` by
`python -m zppo_mm.config.help > docs/configuration.md`.
A test fails when it is stale.

A run takes its keys from these sources.
Later ones take precedence:

1. the defaults below: the paper's values, where it gives them
   (exceptions: [differences from the paper](algorithm.md#differences-from-the-paper));
2. the bundled preset `tiny`, if no file is given;
3. the settings of the method;
4. the YAML file (`--config`);
5. `key=value` and `key.sub=value` on the command line, in their order.

An unknown key, a value of the wrong type or out of its range, and keys that contradict one another
are errors.
An empty *allowed* means every value of the type.
*Resume* is "yes" for keys that may change when a run is resumed; a change of any other is an error.
"""
_METHODS_HEAD = """## Methods

`method` sets the keys of its row and turns the other switches of `zone` and `distill` off.
Explicitly set keys take precedence, so that methods can be combined: `method=zppo zone.hint=true`.
The third column says whether the method asks the teacher.
Unless `teacher.compressor=rule`, the NCQ methods ask it too, to compress candidates.
"""
_FIRST_ONLY = "Not for fallback teachers."


def add_options(
    parser: argparse.ArgumentParser, meaning: str = "options, which take precedence over the file"
) -> None:
    """Add the `key=value` words of a tool's command line."""
    parser.add_argument("options", nargs="*", metavar="key=value", help=meaning)


@dataclass(frozen=True, slots=True)
class _Section:
    """Some keys with a common prefix.

    Attributes:
        title: The prefix without its dot; empty for the keys of the root.
        help: What the section is.
        kind: The dataclass.
        may_change_on_resume: Whether this holds for all of its keys.
    """

    title: str
    help: str
    kind: Any
    may_change_on_resume: bool = False


def describe_methods() -> str:
    """Return one line per method."""
    width = max(map(len, METHODS))
    return "\n".join(
        f"  {name:{width}}  {method.label}: {method.summary}" for name, method in METHODS.items()
    )


def describe_options() -> str:
    """Return all keys by section: a line `key  type = default` and the meaning of each."""
    return "\n\n".join(
        (f"{each.title}: {each.help}\n" if each.title else "")
        + "\n".join(line for own in _plain_fields(each.kind) for line in _lines(each, own))
        for each in _sections()
    )


def reference_page() -> str:
    """Return the page docs/configuration.md."""
    parts = [_PAGE_HEAD]
    for each in _sections():
        rows = "\n".join(_row(each, own) for own in _plain_fields(each.kind))
        heading = f"## `{each.title}`\n\n{each.help}\n" if each.title else "## Run\n"
        parts.append(
            f"{heading}\n| key | type | default | allowed | resume | meaning |\n"
            f"|---|---|---|---|---|---|\n{rows}\n"
        )
    parts.append(f"{_METHODS_HEAD}\n{_methods_table()}\n")
    return "\n".join(parts)


def _sections() -> Iterator[_Section]:
    """Yield the root, every section, and the entries of lists that are no section themselves."""
    hints = get_type_hints(RunConfig)
    sections = [
        _Section(own.name, declared(own).help, hints[own.name], declared(own).may_change_on_resume)
        for own in fields(RunConfig)
        if is_dataclass(hints[own.name])
    ]
    described = {each.kind for each in sections}
    yield _Section("", "", RunConfig)
    for each in sections:
        yield each
        types = get_type_hints(each.kind)
        for own in _plain_fields(each.kind):
            kind = entry_type(types[own.name])
            if kind is not None and kind not in described:
                described.add(kind)
                yield _Section(
                    f"{each.title}.{own.name}[]", " ".join(str(kind.__doc__).split()), kind
                )


def _plain_fields(kind: Any) -> list[Field[Any]]:
    """Return the fields that are not sections."""
    hints = get_type_hints(kind)
    return [own for own in fields(kind) if not is_dataclass(hints[own.name])]


def _path(each: _Section, own: Field[Any]) -> str:
    return f"{each.title}.{own.name}" if each.title else own.name


def _lines(each: _Section, own: Field[Any]) -> list[str]:
    """Describe a key for `--help`."""
    # Types are strings in the configuration's modules, as a reader wrote them.
    known, shown = declared(own), f"{own.type} = {_default_text(own)}"
    allowed = f" [{_allowed(own)}]" if _allowed(own) and own.name != "method" else ""
    return [
        f"  {_path(each, own)}  {shown}",
        *textwrap.wrap(
            known.help + allowed, LINE_WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6
        ),
    ]


def _row(each: _Section, own: Field[Any]) -> str:
    """Describe a key as a row of the page."""
    known = declared(own)
    resume = "yes" if each.may_change_on_resume or known.may_change_on_resume else ""
    meaning = f"{known.help} {_FIRST_ONLY}" if known.first_teacher_only else known.help
    allowed = "see [Methods](#methods)" if own.name == "method" else _allowed(own)
    cells = (f"`{_path(each, own)}`", own.type, f"`{_default_text(own)}`", allowed, resume, meaning)
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _allowed(own: Field[Any]) -> str:
    """Return the choices or the range of a key; empty if its type is all there is."""
    known = declared(own)
    return ", ".join(choice or '""' for choice in known.choices) or known.range


def _default_text(own: Field[Any]) -> str:
    """Write a default as on the command line."""
    value = default_of(own)
    if isinstance(value, bool):
        return str(value).lower()
    return '""' if value == "" else str(value)


def _methods_table() -> str:
    """Return the methods with what they do and set."""
    rows = ["| method | label | teacher | what it trains on | settings |", "|---|---|---|---|---|"]
    for name, method in METHODS.items():
        settings = ", ".join(
            f"`{key}={str(value).lower()}`"
            for key, value in method.settings.items()
            if value not in (False, "none")
        )
        teacher = "yes" if method.needs_teacher else ""
        rows.append(f"| `{name}` | {method.label} | {teacher} | {method.summary} | {settings} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.stdout.write(reference_page())
