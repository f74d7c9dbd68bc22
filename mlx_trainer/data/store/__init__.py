"""The tokens of all rows on disk, built once and mapped into memory."""
