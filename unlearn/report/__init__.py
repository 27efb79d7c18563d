"""What a query ends in: the picture, the table, the files."""
