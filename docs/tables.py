"""Puts the tables of benchmarks/results into README.md: python docs/tables.py. Tables are made by the benchmarks."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PLACE = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end of table -->)", re.S)


def filled(text: str) -> str:
    """Between each pair of marks the first table of the file that they name."""
    return PLACE.sub(lambda found: f"{found[1]}\n{first_table(ROOT / found[2])}\n\n{found[3]}", text)


def first_table(path: Path) -> str:
    if not path.exists():
        return "*Not measured yet.*"
    table = re.search(r"(?:^\|.*\n)+", path.read_text(encoding="utf-8"), re.M)
    return table[0].strip()


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text(encoding="utf-8")), encoding="utf-8")
