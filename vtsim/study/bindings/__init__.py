"""Bindings of published rows to runs, one file per family of rows; importing a file registers its rows."""
