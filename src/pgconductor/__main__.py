"""`python -m pgconductor`: the command line."""

from pgconductor.cli import main

main(prog_name="pgconductor")
