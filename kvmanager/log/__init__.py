"""The log in files: journal, recovery from it, and reading it from outside."""
