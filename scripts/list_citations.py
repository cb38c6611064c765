"""Print the sections that the code cites, in the form of docs/references.toml."""

from __future__ import annotations

from tests.test_citations import BOOKS, cited


def main() -> None:
    """Print the bibliography that the code needs today."""
    for book, entry in BOOKS.items():
        print(f'[{book}]\nedition = "{entry["edition"]}"\nsections = [')
        for title in sorted(title for each, title in cited() if each == book):
            print(f'    "{title}",')
        print("]\n")


if __name__ == "__main__":
    main()
