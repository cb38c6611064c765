"""A study as one HTML file that needs nothing else: question, pictures, tables, and where the numbers come from."""
