"""What came out of a run, for programs (``summary.json``) and for people (``report.html``)."""
