"""Text from anywhere, made safe for one line of a terminal, a log or an error."""


def one_line(text: str, chars_max: int = 2000) -> str:
    """The text on one line: no control characters, no endless length, runs of blanks as one blank."""
    flat = " ".join(text.split())
    if not flat.isprintable():
        flat = "".join(char if char.isprintable() else _escaped(char) for char in flat)
    return flat if len(flat) <= chars_max else flat[: chars_max - 1] + "…"


def utf8(text: str) -> str:
    """The text as UTF-8 can say it: JSON may bring lone surrogates, which no file and no database takes."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode()
