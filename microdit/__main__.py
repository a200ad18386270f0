"""python -m microdit, as torchrun starts it."""

from microdit.cli import main

main()
