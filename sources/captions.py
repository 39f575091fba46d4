"""Captions as they stand in files: bytes or json -> str."""

import re


class BadSample(Exception):
    """One sample cannot be used: 'reason' or 'reason: detail'."""


def to_text(content):
    """The bytes of a caption -> str, with single spaces."""
    try:
        text = " ".join(content.decode("utf-8-sig").split())
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        pairs = re.sub(rb"[\xa1-\xfe]{2}", b"", content).isascii()
        guess = ("utf-16" if b"\0" in content else "gb18030" if pairs else
                 "cp1252" if re.search(rb"[\x80-\x9f]", content) else "latin-1")
        raise BadSample(f"caption is not UTF-8: as {guess} it would be "
                        f"{content.decode(guess, errors='replace')[:40]!r}")
    if not text:
        raise BadSample("empty caption")
    return text


def caption_of(meta):
    """The caption, or a list of them, in a .json or an entry of a listing; None without."""
    return next((meta[name] for name in ("text", "caption", "TEXT")
                 if meta.get(name) and isinstance(meta[name], (str, list))), None)
