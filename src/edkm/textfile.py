"""Read a text file that a user names: training data, held-out texts and texts to score."""

import codecs
from pathlib import Path

_MARKS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


class TextFileError(ValueError):
    """A file that is not text; the message names the file, the rule and the remedy."""


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file, with or without a byte order mark, with any kind of line end; refuse another encoding, null bytes, no text."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        found = _MARKS.get(error.object[:2])
        reason = f"it begins as {found} does" if found else f"{error.reason} at byte {error.start}"
        raise TextFileError(f"{path}: is not UTF-8 text ({reason}). Convert it: iconv -f {found or 'ENCODING'} -t UTF-8.") from error
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise TextFileError(f"{path}: cannot be read ({reason}); expected a UTF-8 text file. Check the path.") from error
    if "\0" in text:
        raise TextFileError(f"{path}: holds null bytes, so it is not text, or it is UTF-16. Give text, or convert it to UTF-8.")
    if not text.strip():
        raise TextFileError(f"{path}: is empty. Give a file with text in it.")
    return text
