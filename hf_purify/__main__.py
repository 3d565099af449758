"""`python -m hf_purify`."""

from hf_purify.cli import main

main()
