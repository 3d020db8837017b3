"""`python -m kdnas` is `kdnas`."""

from kdnas.cli.commands import main

main()
