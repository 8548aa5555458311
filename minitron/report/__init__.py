"""One self-contained page that compares runs, and the same table as Markdown and plain text."""
