"""``python -m aesthetic_filter``."""

from aesthetic_filter.cli import main

main()
