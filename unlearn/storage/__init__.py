"""Files that appear whole or not at all, input read without trust, hashes, records, chunks, and
work that processes share."""
