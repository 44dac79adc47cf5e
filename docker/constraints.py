"""Which versions pip may install into an image that brings packages of its own: those are kept, all
others are the tested ones.

`python docker/constraints.py IMAGE.json CONSTRAINTS` prints pip's constraints;
`python docker/constraints.py --unchanged IMAGE.json NOW.json` fails if a package of the image has
another version now. The JSON files are of `pip list --format=json`.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

# What builds this package, in an environment of its own, may be newer than the image's.
_BUILD = frozenset(("pip", "setuptools", "wheel"))


def installed(path: Path) -> dict[str, str]:
    """Return the versions of a list of packages, by normalised name."""
    return {_normalised(each["name"]): each["version"] for each in json.loads(path.read_text())}


def constraints(image: dict[str, str], tested: str) -> list[str]:
    """Return the image's packages, and the lines of the others."""
    kept = [f"{name}=={version}" for name, version in sorted(image.items())]
    kept = [line for line in kept if line.split("==")[0] not in _BUILD]
    lines = [line for line in tested.splitlines() if "==" in line and not line.startswith("#")]
    return kept + [line for line in lines if _normalised(line.split("==")[0]) not in image]


def changed(image: dict[str, str], now: dict[str, str]) -> list[str]:
    """Return what is not as the image brought it, in words."""
    return [
        f"{name} was {version}, is {now.get(name, 'gone')}"
        for name, version in sorted(image.items())
        if now.get(name) != version
    ]


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def main() -> int:
    """Print constraints, or what has changed."""
    *options, first, second = sys.argv[1:]
    image = installed(Path(first))
    if options:
        found = changed(image, installed(Path(second)))
        sys.stderr.writelines(f"constraints: {line}\n" for line in found)
        return int(bool(found))
    sys.stdout.writelines(
        f"{line}\n" for line in constraints(image, Path(second).read_text(encoding="utf-8"))
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
