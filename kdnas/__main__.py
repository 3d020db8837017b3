"""`python -m kdnas` is `kdnas`."""

from kdnas.cli import main

main()
