"""The page of hf-purify, as a Space: the Hub sets `SPACE_ID`, by which the page knows that strangers reach it."""

from hf_purify.cli import app

app(["ui", "--port", "7860", "--folder", "runs"])
