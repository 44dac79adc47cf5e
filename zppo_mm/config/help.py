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

from zppo_mm.config.keys import Change, declared, default_of, entry_type, most_allowed
from zppo_mm.config.schema import RunConfig
from zppo_mm.methods import METHODS
from zppo_mm.piped_output import ends_with_its_reader

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
*Resume* says whether a resumed run may have another value of the key: "yes"; "consent", if
`checkpoint.allow_changes` names the key or its section; or, where it is empty, never.
Any other change is an error.
"""
_RESUME = {True: "yes", "consent": "consent", False: ""}
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


def parse_with_options(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """Read the command line of a parser with `add_options`. A key that is written like an option of
    the tool ends the program with what to write.
    """
    with ends_with_its_reader():  # --help prints pages
        known, others = parser.parse_known_intermixed_args(arguments)
    for word in others:
        name, _, value = word.lstrip("-").partition("=")
        if word.startswith("--") and ("." in name or hasattr(RunConfig, name)):
            parser.error(
                f"argument {word}: a key with dashes, got {word!r}, expected {name}="
                f"{value or 'VALUE'}; write it without dashes"
            )
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    return known


@dataclass(frozen=True, slots=True)
class _Section:
    """Some keys with a common prefix.

    Attributes:
        title: The prefix without its dot; empty for the keys of the root.
        help: What the section is.
        kind: The dataclass.
        may_change_on_resume: What this is for all of its keys that do not allow more.
    """

    title: str
    help: str
    kind: Any
    may_change_on_resume: Change = False


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
    resume = _RESUME[most_allowed(each.may_change_on_resume, known.may_change_on_resume)]
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
    with ends_with_its_reader():
        sys.stdout.write(reference_page())
