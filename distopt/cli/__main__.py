"""`python -m distopt.cli`: the `distopt` command where its script is not on the path."""

from distopt.cli import main

main()
