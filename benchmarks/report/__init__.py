"""The report: what was found, for people (Markdown) and for programs (JSON)."""
