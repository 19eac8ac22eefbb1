"""`python -m vpt.cli`: `vpt`, where a launcher wants a module."""

from vpt.cli import main

main()
