"""What the HTTP interface's two sides share: the JSON shapes, the problem types, headers, times and paths."""
