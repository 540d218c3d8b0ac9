"""Documents from a database instead of files.

llm.train(llm.load_recipe("quickstart", ["run=notes"]), documents=partial(rows, Path("notes.sqlite")))
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path


def rows(database: Path) -> Iterator[str]:
    """Each call opens the database anew and gives the same documents in the same order."""
    with closing(sqlite3.connect(database)) as connection:
        for (text,) in connection.execute("SELECT text FROM notes ORDER BY id"):
            yield text
