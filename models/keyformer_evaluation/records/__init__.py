"""What is measured is kept: results and where they come from, by item and in files."""
