"""Studies that are finished: what conversion costs, and training from scratch. They run again with `python -m studies.NAME`."""
