"""The limits that tests assert, in one place."""

README_LINES = 250
