"""`python -m squizd.cli`."""

from . import main

main()
