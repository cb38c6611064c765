"""A single run as a timeline, for ui.perfetto.dev and other viewers of traces."""
