"""Output on terminals and pipes that cannot show every character."""

import sys


def escape_unencodable() -> None:
    """Makes standard output and error write characters outside their encoding as escapes, where they would raise."""
    for stream in (sys.stdout, sys.stderr):
        # Notebooks and tests replace these by objects that take any text.
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
